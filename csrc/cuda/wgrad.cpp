// The operator llmtrain_cuda::fp8_wgrad_: a weight gradient of FP8 operands that is added to a
// float32 sum inside the product (cuBLASLt with beta = 1; torch's product has no beta).
//
// Built where cuBLASLt's headers are (LLMTRAIN_CUBLASLT). The library itself is not linked but
// looked up when it is first needed: a CUDA build of torch has loaded it already, and without one
// everything else in here still loads.
//
// In a CUDA graph: algorithms are chosen on the host, once for each shape; the workspace is a
// tensor of torch's allocator, made and freed in the order of the stream; alpha is a constant of
// the layer.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <string>

#ifdef LLMTRAIN_CUBLASLT

#include <cublasLt.h>
#include <dlfcn.h>

#include <array>
#include <map>
#include <memory>
#include <mutex>
#include <optional>

#include "tensors.h"

namespace llmtrain {

namespace {

#define LLMTRAIN_TEXT_OF(x) #x
#define LLMTRAIN_TEXT(x) LLMTRAIN_TEXT_OF(x)
constexpr const char* kLibrary = "libcublasLt.so." LLMTRAIN_TEXT(CUBLAS_VER_MAJOR);

// The functions that are called, by their declarations in the header.
struct CublasLt {
  std::string fault;
  decltype(&cublasLtCreate) create = nullptr;
  decltype(&cublasLtGetStatusString) status_string = nullptr;
  decltype(&cublasLtMatmul) matmul = nullptr;
  decltype(&cublasLtMatmulAlgoGetHeuristic) heuristic = nullptr;
  decltype(&cublasLtMatmulDescCreate) desc_create = nullptr;
  decltype(&cublasLtMatmulDescDestroy) desc_destroy = nullptr;
  decltype(&cublasLtMatmulDescSetAttribute) desc_set = nullptr;
  decltype(&cublasLtMatrixLayoutCreate) layout_create = nullptr;
  decltype(&cublasLtMatrixLayoutDestroy) layout_destroy = nullptr;
  decltype(&cublasLtMatmulPreferenceCreate) preference_create = nullptr;
  decltype(&cublasLtMatmulPreferenceDestroy) preference_destroy = nullptr;
  decltype(&cublasLtMatmulPreferenceSetAttribute) preference_set = nullptr;

  CublasLt() {
    // That of torch first: a second copy would have handles and memory of its own.
    void* library = dlopen(kLibrary, RTLD_LAZY | RTLD_NOLOAD);
    if (library == nullptr) library = dlopen(kLibrary, RTLD_LAZY | RTLD_LOCAL);
    if (library == nullptr) {
      const char* said = dlerror();
      fault = said == nullptr ? std::string(kLibrary) + " does not load" : said;
      return;
    }
    find(library, "cublasLtCreate", create);
    find(library, "cublasLtGetStatusString", status_string);
    find(library, "cublasLtMatmul", matmul);
    find(library, "cublasLtMatmulAlgoGetHeuristic", heuristic);
    find(library, "cublasLtMatmulDescCreate", desc_create);
    find(library, "cublasLtMatmulDescDestroy", desc_destroy);
    find(library, "cublasLtMatmulDescSetAttribute", desc_set);
    find(library, "cublasLtMatrixLayoutCreate", layout_create);
    find(library, "cublasLtMatrixLayoutDestroy", layout_destroy);
    find(library, "cublasLtMatmulPreferenceCreate", preference_create);
    find(library, "cublasLtMatmulPreferenceDestroy", preference_destroy);
    find(library, "cublasLtMatmulPreferenceSetAttribute", preference_set);
  }

  template <class F>
  void find(void* library, const char* name, F& function) {
    function = reinterpret_cast<F>(dlsym(library, name));
    if (function == nullptr) fault = std::string(kLibrary) + " has no " + name;
  }
};

const CublasLt& lt() {
  static const CublasLt loaded;
  return loaded;
}

void check(cublasStatus_t status, const char* where) {
  STD_TORCH_CHECK(status == CUBLAS_STATUS_SUCCESS, where, ": ", lt().status_string(status));
}

struct Released {
  void operator()(cublasLtMatmulDescOpaque_t* x) const { lt().desc_destroy(x); }
  void operator()(cublasLtMatrixLayoutOpaque_t* x) const { lt().layout_destroy(x); }
  void operator()(cublasLtMatmulPreferenceOpaque_t* x) const { lt().preference_destroy(x); }
};
template <class T>
using Owned = std::unique_ptr<T, Released>;
using Desc = Owned<cublasLtMatmulDescOpaque_t>;
using Layout = Owned<cublasLtMatrixLayoutOpaque_t>;
using Preference = Owned<cublasLtMatmulPreferenceOpaque_t>;

template <class T>
void set(const Desc& desc, cublasLtMatmulDescAttributes_t which, T value) {
  check(lt().desc_set(desc.get(), which, &value, sizeof(value)), "cublasLtMatmulDescSetAttribute");
}

template <class T>
void set(const Preference& preference, cublasLtMatmulPreferenceAttributes_t which, T value) {
  check(lt().preference_set(preference.get(), which, &value, sizeof(value)),
        "cublasLtMatmulPreferenceSetAttribute");
}

Layout layout(cudaDataType_t type, int64_t rows, int64_t columns) {
  cublasLtMatrixLayout_t made = nullptr;
  check(lt().layout_create(&made, type, static_cast<uint64_t>(rows),
                           static_cast<uint64_t>(columns), rows),
        "cublasLtMatrixLayoutCreate");
  return Layout(made);
}

// cuBLASLt counts by columns: total [out, in] is its D [in, out], and both operands, transposed
// copies [in, n] and [out, n] whose rows are n long, are its [n, in] and [n, out]: the layout
// that Hopper's FP8 products ask for, A transposed and B not.
constexpr int64_t kWorkspace = int64_t{32} << 20;
constexpr int kAsked = 8;

struct Product {
  Desc desc;
  Layout a, b, d;
  std::optional<cublasLtMatmulHeuristicResult_t> chosen;
};

// Device, in, out, n, alignments of x, grad and total.
using Key = std::array<int64_t, 7>;

int64_t alignment(const void* data) {
  const auto address = reinterpret_cast<uintptr_t>(data);
  int64_t bytes = 256;
  while (address % bytes != 0) bytes /= 2;
  return bytes;
}

Product make(cublasLtHandle_t handle, const Key& key) {
  const auto [device, in, out, n, of_x, of_grad, of_total] = key;
  cublasLtMatmulDesc_t made = nullptr;
  check(lt().desc_create(&made, CUBLAS_COMPUTE_32F, CUDA_R_32F), "cublasLtMatmulDescCreate");
  Product product{Desc(made), layout(CUDA_R_8F_E4M3, n, in), layout(CUDA_R_8F_E5M2, n, out),
                  layout(CUDA_R_32F, in, out), std::nullopt};
  set(product.desc, CUBLASLT_MATMUL_DESC_TRANSA, CUBLAS_OP_T);
  set(product.desc, CUBLASLT_MATMUL_DESC_TRANSB, CUBLAS_OP_N);
  // Sums of full precision, as torch's products of backward have them.
  set(product.desc, CUBLASLT_MATMUL_DESC_FAST_ACCUM, int8_t{0});
  cublasLtMatmulPreference_t wanted = nullptr;
  check(lt().preference_create(&wanted), "cublasLtMatmulPreferenceCreate");
  const Preference preference(wanted);
  set(preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, static_cast<uint64_t>(kWorkspace));
  set(preference, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, static_cast<uint32_t>(of_x));
  set(preference, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, static_cast<uint32_t>(of_grad));
  set(preference, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, static_cast<uint32_t>(of_total));
  set(preference, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, static_cast<uint32_t>(of_total));
  cublasLtMatmulHeuristicResult_t found[kAsked];
  int count = 0;
  const auto& d = product.d;
  const cublasStatus_t status =
      lt().heuristic(handle, product.desc.get(), product.a.get(), product.b.get(), d.get(),
                     d.get(), preference.get(), kAsked, found, &count);
  if (status == CUBLAS_STATUS_NOT_SUPPORTED) return product;
  check(status, "cublasLtMatmulAlgoGetHeuristic");
  for (int i = 0; i < count && !product.chosen; ++i)
    if (found[i].state == CUBLAS_STATUS_SUCCESS) product.chosen = found[i];
  return product;
}

std::mutex lock;

// Never freed: CUDA may be gone before static objects are.
cublasLtHandle_t handle_of(int64_t device) {
  static auto* handles = new std::map<int64_t, cublasLtHandle_t>;
  cublasLtHandle_t& handle = (*handles)[device];
  if (handle == nullptr) check(lt().create(&handle), "cublasLtCreate");
  return handle;
}

Product& product_of(cublasLtHandle_t handle, const Key& key) {
  static auto* products = new std::map<Key, Product>;
  const auto found = products->find(key);
  if (found != products->end()) return found->second;
  return products->emplace(key, make(handle, key)).first->second;
}

const void* scale_of(const std::optional<Tensor>& scale, const Tensor& like) {
  if (!scale) return nullptr;
  STD_TORCH_CHECK(scale->numel() == 1 && scale->scalar_type() == ScalarType::Float &&
                      scale->get_device_index() == like.get_device_index(),
                  "scale: one float32 on the same device");
  return scale->const_data_ptr();
}

void check_operand(const Tensor& x, ScalarType dtype, const Tensor& total, int64_t rows,
                   const char* name) {
  STD_TORCH_CHECK(x.dim() == 2 && x.is_contiguous() && x.scalar_type() == dtype &&
                      x.get_device_index() == total.get_device_index(),
                  name, ": a contiguous FP8 matrix on the device of total");
  STD_TORCH_CHECK(x.size(0) == rows && x.size(1) % 16 == 0, name, ": wrong shape");
  STD_TORCH_CHECK(alignment(x.const_data_ptr()) >= 16, name, ": not aligned");
}

}  // namespace

// total [out, in] += factor grad x^T of grad [out, n] and x [in, n], times their scales. False,
// and nothing done, where cuBLASLt has no algorithm for it.
bool fp8_wgrad_(Tensor total, const Tensor& grad, const Tensor& x, double factor,
                const std::optional<Tensor>& grad_scale, const std::optional<Tensor>& x_scale) {
  const torch::stable::accelerator::DeviceGuard guard(total.get_device_index());
  STD_TORCH_CHECK(lt().fault.empty(), lt().fault);
  STD_TORCH_CHECK(total.dim() == 2 && total.is_contiguous() &&
                      total.scalar_type() == ScalarType::Float && total.size(1) % 16 == 0,
                  "total: a contiguous float32 matrix, its rows a multiple of 16 long");
  const int64_t out = total.size(0), in = total.size(1);
  check_operand(grad, ScalarType::Float8_e5m2, total, out, "grad");
  check_operand(x, ScalarType::Float8_e4m3fn, total, in, "x");
  STD_TORCH_CHECK(grad.size(1) == x.size(1), "grad and x: another number of tokens");
  const int64_t n = x.size(1);
  if (out == 0 || in == 0 || n == 0) return true;
  const void *a = x.const_data_ptr(), *b = grad.const_data_ptr();
  void* sum = total.mutable_data_ptr();
  const int64_t device = total.get_device_index();
  const cudaStream_t stream = stream_for(total);
  const std::lock_guard<std::mutex> held(lock);
  const cublasLtHandle_t handle = handle_of(device);
  const Key key{device, in, out, n, alignment(a), alignment(b), alignment(sum)};
  Product& product = product_of(handle, key);
  if (!product.chosen) return false;
  set(product.desc, CUBLASLT_MATMUL_DESC_A_SCALE_POINTER, scale_of(x_scale, total));
  set(product.desc, CUBLASLT_MATMUL_DESC_B_SCALE_POINTER, scale_of(grad_scale, total));
  const auto room = static_cast<int64_t>(product.chosen->workspaceSize);
  Tensor workspace = torch::stable::new_empty(total, {room}, ScalarType::Byte);
  const float alpha = static_cast<float>(factor), beta = 1.0f;
  check(lt().matmul(handle, product.desc.get(), &alpha, a, product.a.get(), b, product.b.get(),
                    &beta, sum, product.d.get(), sum, product.d.get(), &product.chosen->algo,
                    workspace.mutable_data_ptr(), static_cast<size_t>(room),
                    stream),
        "cublasLtMatmul");
  return true;
}

std::string cublaslt_fault() { return lt().fault; }

STABLE_TORCH_LIBRARY_FRAGMENT(llmtrain_cuda, m) {
  m.def(
      "fp8_wgrad_(Tensor(a!) total, Tensor grad, Tensor x, float factor, Tensor? grad_scale, "
      "Tensor? x_scale) -> bool");
  m.def("cublaslt_fault() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(llmtrain_cuda, CUDA, m) {
  m.impl("fp8_wgrad_", TORCH_BOX(&fp8_wgrad_));
}

STABLE_TORCH_LIBRARY_IMPL(llmtrain_cuda, CompositeExplicitAutograd, m) {
  m.impl("cublaslt_fault", TORCH_BOX(&cublaslt_fault));
}

}  // namespace llmtrain

#endif

// The version of the headers it was built with; empty: built without.
extern "C" __attribute__((visibility("default"))) const char* llmtrain_cuda_cublaslt() {
#ifdef LLMTRAIN_CUBLASLT
  return LLMTRAIN_TEXT(CUBLAS_VER_MAJOR) "." LLMTRAIN_TEXT(CUBLAS_VER_MINOR);
#else
  return "";
#endif
}
