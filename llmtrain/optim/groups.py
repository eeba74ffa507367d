"""Parameter groups by role: which parameters share a learning-rate factor and a decay."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import nn

from llmtrain.config.schema import OptimConfig
from llmtrain.errors import ConfigError
from llmtrain.model.scaling import decay_factor


@dataclass
class ParamGroup:
    """Parameters of one role. lr_factor multiplies the scheduled rate; decays or not."""

    role: str
    lr_factor: float
    weight_decay: float
    names: list[str] = field(default_factory=list)
    params: list[nn.Parameter] = field(default_factory=list)

    @property
    def n_params(self) -> int:
        """Elements over all ranks."""
        return sum(p.numel() for p in self.params)


def build_groups(
    named: Mapping[str, nn.Parameter],
    roles: Mapping[str, str],
    cfg: OptimConfig,
    rates: Mapping[str, float] | None = None,
) -> list[ParamGroup]:
    """Group trainable parameters by role, in the order of first appearance.

    roles: parameter name -> role. rates: role -> factor of the model's parametrisation on the
    learning rate (``model.rate_factors``), besides ``optim.lr_factors``. Raises ConfigError for a
    role in ``optim.lr_factors`` or ``optim.decay_roles`` that no parameter can have.
    """
    known = {"embedding", "hidden", "norm", "head", "bias", "adapter"}
    for key, listed in (("lr_factors", cfg.lr_factors), ("decay_roles", cfg.decay_roles)):
        for role in listed:
            if role not in known:
                raise ConfigError(
                    f"optim.{key}: no parameter has the role {role!r}; "
                    f"the roles are {', '.join(sorted(known))}"
                )
    groups: dict[str, ParamGroup] = {}
    for name, param in named.items():
        if not param.requires_grad:
            continue
        role = roles[name]
        if role not in groups:
            rate = 1.0 if rates is None else rates[role]
            decay = cfg.weight_decay if role in cfg.decay_roles else 0.0
            factor = rate * cfg.lr_factors.get(role, 1.0)
            groups[role] = ParamGroup(role, factor, decay * decay_factor(rate, cfg))
        groups[role].names.append(name)
        groups[role].params.append(param)
    return list(groups.values())


def groups_table(groups: list[ParamGroup], cfg: OptimConfig) -> list[tuple[str, ...]]:
    """Rows (role, tensors, parameters, peak lr, weight decay) with a header, for printing."""
    rows: list[tuple[str, ...]] = [("role", "tensors", "parameters", "peak lr", "weight decay")]
    for group in groups:
        rows.append(
            (
                group.role,
                str(len(group.params)),
                f"{group.n_params:,}",
                f"{cfg.lr * group.lr_factor:.3g}",
                f"{group.weight_decay:g}",
            )
        )
    return rows
