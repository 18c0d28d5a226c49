// The operators under torch.ops.ssd_runtime: schemas, checks, and CPU kernels, on torch's stable ABI.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstring>
#include <mutex>
#include <optional>
#include <string>
#include <tuple>

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

#include "kernels.h"
#include "tensors.h"

namespace {

using namespace ssd;

// Uninitialised bytes, in huge pages where the system gives them.
Tensor huge_memory(int64_t bytes) {
  SSD_CHECK(bytes >= 0, "huge_memory: the number of bytes must be at least 0, not ", bytes);
  Tensor memory = empty_cpu({bytes}, ScalarType::Byte);
#if defined(__linux__)
  const auto page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  const auto begin = (reinterpret_cast<uintptr_t>(memory.data_ptr()) + page - 1) / page * page;
  const auto end = (reinterpret_cast<uintptr_t>(memory.data_ptr()) + bytes) / page * page;
  if (end > begin) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // a hint: may fail
#endif
  return memory;
}

// Memory for packed weights: pieces of large chunks in huge pages, which read a tenth to a fifth faster. A chunk is a
// tensor and lives as long as one of its pieces.
Tensor weight_memory(int64_t bytes) {
  constexpr int64_t kChunk = int64_t{64} << 20, kAlign = 64;
  static std::mutex mutex;
  static Tensor* chunk = nullptr;  // never destroyed: torch may be gone by then
  static int64_t used = 0;
  if (bytes >= kChunk / 4) return huge_memory(bytes);
  const std::lock_guard<std::mutex> lock(mutex);
  if (chunk == nullptr || used + bytes > kChunk) {
    delete chunk;
    chunk = new Tensor(huge_memory(kChunk));
    used = 0;
  }
  Tensor piece = torch::stable::narrow(*chunk, 0, used, bytes);
  used += (bytes + kAlign - 1) / kAlign * kAlign;
  return piece;
}

// ---- linear

ssd::Weights grouped(int64_t bits) { return bits == 4 ? ssd::Weights::kGrouped4 : ssd::Weights::kGrouped8; }

Tensor pack_linear(const Tensor& weight, const std::optional<Tensor>& scales) {
  const View w(weight);
  check_dim(w, 2, "pack_linear", "weight");
  const int64_t outputs = w.sizes[0], inputs = w.sizes[1];
  ssd::Weights kind = ssd::Weights::kInt8;
  if (w.type == ScalarType::BFloat16) {
    kind = ssd::Weights::kBfloat16;
  } else if (w.type == ScalarType::Float) {
    kind = ssd::Weights::kFloat32;
  } else {
    SSD_CHECK(w.type == ScalarType::Char, "pack_linear: weight must be int8, bfloat16 or float32");
  }
  const bool is_int8 = kind == ssd::Weights::kInt8;
  SSD_CHECK(is_int8 == scales.has_value(), "pack_linear: scales belong to int8 weights, and to them only");
  const float* scale = nullptr;
  if (is_int8) {
    const View s(*scales);
    check_dim(s, 1, "pack_linear", "scales");
    SSD_CHECK(s.type == ScalarType::Float, "pack_linear: scales must be float32");
    check_size(s.sizes[0], outputs, "pack_linear", "the number of scales");
    scale = reinterpret_cast<const float*>(s.data);
  }
  const int64_t bytes = ssd::panel_bytes(kind, inputs), panels = ssd::num_panels(outputs);
  Tensor packed = weight_memory(panels * bytes);
  char* target = static_cast<char*>(packed.data_ptr());
  const int64_t per_step = ssd::features_per_step(kind), steps = ssd::num_steps(kind, inputs), width = 4 / per_step;
  std::memset(target, is_int8 ? 128 : 0, panels * bytes);
  for (int64_t p = 0; p < panels; ++p) {
    char* panel = target + p * bytes;
    if (is_int8) std::memset(panel + steps * ssd::kStepBytes, 0, 4 * ssd::kPanelOutputs);
    for (int64_t o = 0; o < ssd::kPanelOutputs && p * ssd::kPanelOutputs + o < outputs; ++o) {
      const int64_t output = p * ssd::kPanelOutputs + o;
      const char* row = w.data + output * w.strides[0] * width;
      for (int64_t i = 0; i < inputs; ++i) {
        char* place = panel + i / per_step * ssd::kStepBytes + 4 * o + i % per_step * width;
        std::memcpy(place, row + i * width, width);
        if (is_int8) *place = static_cast<char>(*place + 128);
      }
      if (is_int8) std::memcpy(panel + steps * ssd::kStepBytes + 4 * o, scale + output, 4);
    }
  }
  return packed;
}

// codes: uint8, of `bits` bits; scales and minima: float16, one a group of ssd::kFeatureGroup features.
Tensor pack_grouped(const Tensor& codes, const Tensor& scales, const Tensor& minima, int64_t bits) {
  const char* op = "pack_grouped";
  const View c(codes), s(scales), m(minima);
  SSD_CHECK(bits == 4 || bits == 8, op, ": bits must be 4 or 8, not ", bits);
  check_dim(c, 2, op, "codes");
  SSD_CHECK(c.type == ScalarType::Byte, op, ": codes must be uint8");
  const int64_t outputs = c.sizes[0], inputs = c.sizes[1], groups = ssd::num_groups(inputs);
  for (const View* view : {&s, &m}) {
    check_dim(*view, 2, op, "scales and minima");
    SSD_CHECK(view->type == ScalarType::Half, op, ": scales and minima must be float16");
    check_size(view->sizes[0], outputs, op, "the rows of scales and minima");
    check_size(view->sizes[1], groups, op, "the groups of scales and minima");
  }
  const int64_t bytes = ssd::panel_bytes(grouped(bits), inputs), group_bytes = ssd::group_bytes(bits);
  Tensor packed = weight_memory(ssd::num_panels(outputs) * bytes);
  char* target = static_cast<char*>(packed.data_ptr());
  std::memset(target, 0, ssd::num_panels(outputs) * bytes);
  for (int64_t output = 0; output < outputs; ++output) {
    const int64_t lane = output % ssd::kPanelOutputs;
    char* panel = target + output / ssd::kPanelOutputs * bytes;
    for (int64_t g = 0; g < groups; ++g) {
      std::memcpy(panel + g * group_bytes + 2 * lane, s.data + 2 * (output * s.strides[0] + g), 2);
      std::memcpy(panel + g * group_bytes + 64 + 2 * lane, m.data + 2 * (output * m.strides[0] + g), 2);
    }
    for (int64_t i = 0; i < inputs; ++i) {
      const auto code = static_cast<uint8_t>(c.data[output * c.strides[0] + i]);
      SSD_CHECK(code < 1 << bits, op, ": a code is ", static_cast<int>(code), ", which is more than ", bits, " bits");
      const int64_t step = i % ssd::kFeatureGroup / 4, shift = bits == 4 ? step % 2 * 4 : 0;
      char* codes = panel + i / ssd::kFeatureGroup * group_bytes + 128 + ssd::kStepBytes * (step * bits / 8);
      char* place = codes + 4 * lane + i % 4;
      *place = static_cast<char>(*place | code << shift);
    }
  }
  return packed;
}

Tensor linear(ssd::Weights kind, const char* op, const Tensor& x, const Tensor& packed, int64_t out_features,
              const std::optional<Tensor>& bias) {
  const View xv(x), pv(packed);
  ssd::LinearArgs args{};
  args.weights = kind;
  args.dtype = float_dtype(xv, op, "x");
  check_dim(xv, 2, op, "x");
  args.num_rows = xv.sizes[0];
  args.in_features = xv.sizes[1];
  args.out_features = out_features;
  SSD_CHECK(pv.type == ScalarType::Byte && pv.dim == 1 && out_features >= 0 &&
                pv.sizes[0] == ssd::num_panels(out_features) * ssd::panel_bytes(kind, args.in_features),
            op, ": x has ", args.in_features, " features, and the packed weight is not one of ", out_features, " x ",
            args.in_features);
  args.x = xv.data;
  args.x_stride = xv.strides[0];
  args.panels = pv.data;
  if (bias.has_value()) {
    const View bv(*bias);
    args.bias_dtype = float_dtype(bv, op, "bias");
    check_dim(bv, 1, op, "bias");
    check_size(bv.sizes[0], out_features, op, "the length of bias");
    args.bias = bv.data;
  }
  Tensor out = empty_cpu({args.num_rows, out_features}, xv.type);
  args.out = out.data_ptr();
  run_linear(args);
  return out;
}

Tensor linear_int8(const Tensor& x, const Tensor& packed, int64_t out_features, const std::optional<Tensor>& bias) {
  return linear(ssd::Weights::kInt8, "linear_int8", x, packed, out_features, bias);
}
Tensor linear_grouped(const Tensor& x, const Tensor& packed, int64_t out_features, const std::optional<Tensor>& bias,
                      int64_t bits) {
  SSD_CHECK(bits == 4 || bits == 8, "linear_grouped: bits must be 4 or 8, not ", bits);
  return linear(grouped(bits), "linear_grouped", x, packed, out_features, bias);
}
Tensor linear_bf16(const Tensor& x, const Tensor& packed, int64_t out_features, const std::optional<Tensor>& bias) {
  return linear(ssd::Weights::kBfloat16, "linear_bf16", x, packed, out_features, bias);
}
Tensor linear_fp32(const Tensor& x, const Tensor& packed, int64_t out_features, const std::optional<Tensor>& bias) {
  return linear(ssd::Weights::kFloat32, "linear_fp32", x, packed, out_features, bias);
}

// ---- norms and activations

ssd::NormArgs norm_args(const char* op, const View& x, const View& weight, double eps) {
  ssd::NormArgs args{};
  args.dtype = float_dtype(x, op, "x");
  args.weight_dtype = float_dtype(weight, op, "weight");
  check_dim(x, 2, op, "x");
  check_dim(weight, 1, op, "weight");
  check_size(weight.sizes[0], x.sizes[1], op, "the length of weight");
  args.num_rows = x.sizes[0];
  args.num_features = x.sizes[1];
  args.x = x.data;
  args.x_stride = x.strides[0];
  args.weight = weight.data;
  args.eps = static_cast<float>(eps);
  return args;
}

Tensor rms_norm(const Tensor& x, const Tensor& weight, double eps) {
  const View xv(x);
  ssd::NormArgs args = norm_args("rms_norm", xv, View(weight), eps);
  Tensor out = empty_cpu({args.num_rows, args.num_features}, xv.type);
  args.out = out.data_ptr();
  ssd::kernels().rms_norm(args);
  return out;
}

std::tuple<Tensor, Tensor> add_rms_norm(const Tensor& x, const Tensor& residual, const Tensor& weight, double eps) {
  const View xv(x), rv(residual);
  ssd::NormArgs args = norm_args("add_rms_norm", xv, View(weight), eps);
  check_dim(rv, 2, "add_rms_norm", "residual");
  SSD_CHECK(rv.type == xv.type, "add_rms_norm: x and residual must have one dtype");
  check_size(rv.sizes[0], args.num_rows, "add_rms_norm", "the number of rows of residual");
  check_size(rv.sizes[1], args.num_features, "add_rms_norm", "the number of features of residual");
  args.residual = rv.data;
  args.residual_stride = rv.strides[0];
  Tensor out = empty_cpu({args.num_rows, args.num_features}, xv.type);
  Tensor total = empty_cpu({args.num_rows, args.num_features}, xv.type);
  args.out = out.data_ptr();
  args.total = total.data_ptr();
  if (args.num_rows > 0) ssd::kernels().rms_norm(args);
  return {out, total};
}

Tensor silu_mul(const Tensor& gate_up) {
  const View gv(gate_up);
  check_dim(gv, 2, "silu_mul", "gate_up");
  SSD_CHECK(gv.sizes[1] % 2 == 0, "silu_mul: gate_up must have an even number of features, not ", gv.sizes[1]);
  ssd::SiluMulArgs args{};
  args.dtype = float_dtype(gv, "silu_mul", "gate_up");
  args.num_rows = gv.sizes[0];
  args.num_features = gv.sizes[1] / 2;
  args.gate_up = gv.data;
  args.stride = gv.strides[0];
  Tensor out = empty_cpu({args.num_rows, args.num_features}, gv.type);
  args.out = out.data_ptr();
  ssd::kernels().silu_mul(args);
  return out;
}

// ---- rotary embedding, cache, attention

void rope_write_(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& cos, const Tensor& sin,
                 const Tensor& kv, const Tensor& slots) {
  const char* op = "rope_write_";
  const View qv(q), kkv(k), vv(v), cv(cos), sv(sin), cache(kv), slot(slots);
  check_dim(qv, 3, op, "q");
  check_dim(kkv, 3, op, "k");
  check_dim(vv, 3, op, "v");
  check_dim(cv, 2, op, "cos");
  check_dim(sv, 2, op, "sin");
  check_int64(slot, 1, op, "slots");
  ssd::RopeArgs args{};
  args.dtype = float_dtype(qv, op, "q");
  args.angle_dtype = float_dtype(cv, op, "cos");
  args.kv_dtype = float_dtype(cache, op, "kv");
  SSD_CHECK(kkv.type == qv.type && vv.type == qv.type, op, ": q, k and v must have one dtype");
  SSD_CHECK(sv.type == cv.type, op, ": cos and sin must have one dtype");
  args.num_rows = qv.sizes[0];
  args.num_heads = qv.sizes[1];
  args.head_dim = qv.sizes[2];
  args.num_kv_heads = kkv.sizes[1];
  SSD_CHECK(args.head_dim % 2 == 0, op, ": the head dimension must be even, not ", args.head_dim);
  check_kv(cache, args.head_dim, op);
  check_size(cache.sizes[2], args.num_kv_heads, op, "the number of heads of kv");
  for (const View* other : {&kkv, &vv}) {
    check_size(other->sizes[0], args.num_rows, op, "the number of rows of k and v");
    check_size(other->sizes[1], args.num_kv_heads, op, "the number of heads of k and v");
    check_size(other->sizes[2], args.head_dim, op, "the head dimension of k and v");
  }
  for (const View* angle : {&cv, &sv}) {
    check_size(angle->sizes[0], args.num_rows, op, "the number of rows of cos and sin");
    check_size(angle->sizes[1], args.head_dim, op, "the last dimension of cos and sin");
  }
  check_size(slot.sizes[0], args.num_rows, op, "the number of slots");
  args.slots = reinterpret_cast<const int64_t*>(slot.data);
  for (int64_t row = 0; row < args.num_rows; ++row) check_range(args.slots[row], 0, cache.sizes[1], op, "slot");
  args.q = qv.data;
  args.k = kkv.data;
  args.v = vv.data;
  for (int i = 0; i < 2; ++i) {
    args.q_strides[i] = qv.strides[i];
    args.k_strides[i] = kkv.strides[i];
    args.v_strides[i] = vv.strides[i];
  }
  args.cos = cv.data;
  args.sin = sv.data;
  args.cos_stride = cv.strides[0];
  args.sin_stride = sv.strides[0];
  args.kv = cache.data;
  for (int i = 0; i < 3; ++i) args.kv_strides[i] = cache.strides[i];
  ssd::kernels().rope_write(args);
}

Tensor paged_attention(const Tensor& q, const Tensor& kv, const Tensor& sequence, const Tensor& tables,
                       const Tensor& prefix, const Tensor& chain, double scale) {
  const char* op = "paged_attention";
  const View qv(q), cache(kv);
  check_dim(qv, 3, op, "q");
  ssd::AttentionArgs args{};
  args.dtype = float_dtype(qv, op, "q");
  args.kv_dtype = float_dtype(cache, op, "kv");
  args.num_rows = qv.sizes[0];
  args.num_heads = qv.sizes[1];
  args.head_dim = qv.sizes[2];
  check_kv(cache, args.head_dim, op);
  args.num_kv_heads = cache.sizes[2];
  SSD_CHECK(args.num_kv_heads > 0 && args.num_heads % args.num_kv_heads == 0, op, ": ", args.num_heads,
            " query heads are no multiple of ", args.num_kv_heads, " key-value heads");
  set_visible(args, sequence, tables, prefix, chain, cache.sizes[1], op);
  args.q = qv.data;
  args.q_strides[0] = qv.strides[0];
  args.q_strides[1] = qv.strides[1];
  args.kv = cache.data;
  for (int i = 0; i < 3; ++i) args.kv_strides[i] = cache.strides[i];
  args.scale = static_cast<float>(scale);
  Tensor out = empty_cpu({args.num_rows, args.num_heads, args.head_dim}, qv.type);
  args.out = out.data_ptr();
  run_attention(args);
  return out;
}

std::string cpu_level() { return ssd::kernels().level; }

}  // namespace

STABLE_TORCH_LIBRARY(ssd_runtime, m) {
  m.def("pack_linear(Tensor weight, Tensor? scales) -> Tensor");
  m.def("pack_grouped(Tensor codes, Tensor scales, Tensor minima, int bits) -> Tensor");
  m.def("linear_grouped(Tensor x, Tensor packed, int out_features, Tensor? bias, int bits) -> Tensor");
  m.def("linear_int8(Tensor x, Tensor packed, int out_features, Tensor? bias) -> Tensor");
  m.def("linear_bf16(Tensor x, Tensor packed, int out_features, Tensor? bias) -> Tensor");
  m.def("linear_fp32(Tensor x, Tensor packed, int out_features, Tensor? bias) -> Tensor");
  m.def("rms_norm(Tensor x, Tensor weight, float eps) -> Tensor");
  m.def("add_rms_norm(Tensor x, Tensor residual, Tensor weight, float eps) -> (Tensor, Tensor)");
  m.def("silu_mul(Tensor gate_up) -> Tensor");
  m.def(
      "rope_write_(Tensor(a!) q, Tensor(b!) k, Tensor v, Tensor cos, Tensor sin, Tensor(c!) kv, Tensor slots) -> ()");
  m.def(
      "paged_attention(Tensor q, Tensor kv, Tensor sequence, Tensor tables, Tensor prefix, Tensor chain, float scale)"
      " -> Tensor");
  m.def("cpu_level() -> str");
  m.def("huge_memory(int num_bytes) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(ssd_runtime, CPU, m) {
  m.impl("pack_linear", TORCH_BOX(&pack_linear));
  m.impl("pack_grouped", TORCH_BOX(&pack_grouped));
  m.impl("linear_grouped", TORCH_BOX(&linear_grouped));
  m.impl("linear_int8", TORCH_BOX(&linear_int8));
  m.impl("linear_bf16", TORCH_BOX(&linear_bf16));
  m.impl("linear_fp32", TORCH_BOX(&linear_fp32));
  m.impl("rms_norm", TORCH_BOX(&rms_norm));
  m.impl("add_rms_norm", TORCH_BOX(&add_rms_norm));
  m.impl("silu_mul", TORCH_BOX(&silu_mul));
  m.impl("rope_write_", TORCH_BOX(&rope_write_));
  m.impl("paged_attention", TORCH_BOX(&paged_attention));
}

STABLE_TORCH_LIBRARY_IMPL(ssd_runtime, CompositeExplicitAutograd, m) {
  m.impl("cpu_level", TORCH_BOX(&cpu_level));
  m.impl("huge_memory", TORCH_BOX(&huge_memory));
}
