// decoder_layers_: all layers of a forward in one call, by the kernels of the single operators. Knows no logits.
//
// The steps, their order and the places where they round are those of the walk in ssd_runtime/model/decoder.py, so both
// give the same bits; what is saved is some eight calls from Python a layer.
#include <algorithm>
#include <cstring>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "tensors.h"

namespace {

using namespace ssd;

constexpr const char* kOp = "decoder_layers_";

int64_t bytes_of(Dtype dtype) { return dtype == Dtype::kFloat32 ? 4 : 2; }
const int64_t* integers(const View& view) { return reinterpret_cast<const int64_t*>(view.data); }

Weights weights_named(const std::string& name) {
  for (const auto& [known, weights] : {std::pair("int4", Weights::kGrouped4), std::pair("int8", Weights::kInt8),
                                       std::pair("bf16", Weights::kBfloat16), std::pair("fp32", Weights::kFloat32)})
    if (name == known) return weights;
  SSD_CHECK(false, kOp, ": weights must be int4, int8, bf16 or fp32, not ", name);
  return Weights::kFloat32;
}

struct Sizes {
  int64_t layers, hidden, heads, kv_heads, head_dim, intermediate;
  int64_t query() const { return heads * head_dim; }
  int64_t fused() const { return (heads + 2 * kv_heads) * head_dim; }  // a row of queries, keys and values
};

// The same linear layer of every decoder layer.
struct Matrices {
  Weights kind;
  int64_t in_features, out_features;
  std::vector<const void*> panels;

  Matrices(Weights kind, const std::vector<Tensor>& packed, int64_t layers, int64_t in, int64_t out, const char* name)
      : kind(kind), in_features(in), out_features(out) {
    SSD_CHECK(static_cast<int64_t>(packed.size()) == layers, kOp, ": ", name, " must have a weight for each of ",
              layers, " layers, not ", packed.size());
    for (const Tensor& tensor : packed) {
      const View view(tensor);
      SSD_CHECK(view.type == ScalarType::Byte && view.dim == 1 &&
                    view.sizes[0] == num_panels(out) * panel_bytes(kind, in),
                kOp, ": ", name, " is not a packed weight of ", out, " x ", in);
      panels.push_back(view.data);
    }
  }
};

// A vector of weights for each of several norms or layers; absent when data is null.
struct Vectors {
  Dtype dtype = Dtype::kFloat32;
  const char* data = nullptr;
  int64_t stride = 0;

  Vectors(const std::optional<Tensor>& tensor, int64_t count, int64_t length, const char* name) {
    if (!tensor.has_value()) return;
    const View view(*tensor);
    check_dim(view, 2, kOp, name);
    SSD_CHECK(view.sizes[0] == count && view.sizes[1] == length, kOp, ": ", name, " must be ", count, " x ", length,
              ", not ", view.sizes[0], " x ", view.sizes[1]);
    dtype = float_dtype(view, kOp, name);
    data = view.data;
    stride = view.strides[0] * bytes_of(dtype);
  }
  const void* operator[](int64_t index) const { return data == nullptr ? nullptr : data + index * stride; }
};

struct Model {
  Sizes sizes;
  float eps;
  Vectors norms, head_norms, qkv_bias, attention_out_bias, gate_up_bias, down_bias;
  Matrices qkv, attention_out, gate_up, down;
};

// One forward: its buffers, and the steps of a layer on them. Every buffer holds contiguous rows.
class Walk {
 public:
  Walk(const Model& model, ScalarType type, Dtype dtype, int64_t num_rows, int64_t most_rows)
      : model_(model),
        type_(type),
        dtype_(dtype),
        size_(bytes_of(dtype)),
        num_rows_(num_rows),
        memory_(empty_cpu({row_bytes() * most_rows + 8 * kAlign}, ScalarType::Byte)) {
    const Sizes& sizes = model.sizes;
    char* next = static_cast<char*>(memory_.data_ptr());
    const auto piece = [&](int64_t features) {
      next = reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(next) + kAlign - 1) / kAlign * kAlign);
      return std::exchange(next, next + features * size_ * most_rows);
    };
    x_ = piece(sizes.hidden);
    residual_ = piece(sizes.hidden);
    qkv_ = piece(sizes.fused());
    attended_ = piece(sizes.query());
    gate_up_ = piece(2 * sizes.intermediate);
    gated_ = piece(sizes.intermediate);
  }

  void embed(const View& embedding, const int64_t* tokens) {
    const int64_t bytes = model_.sizes.hidden * size_;
    for (int64_t row = 0; row < num_rows_; ++row) {
      check_range(tokens[row], 0, embedding.sizes[0], kOp, "token");
      std::memcpy(residual_ + row * bytes, embedding.data + tokens[row] * embedding.strides[0] * size_, bytes);
    }
  }

  void attend(int64_t layer, RopeArgs rope, AttentionArgs attention, char* kv) {
    layer == 0 ? norm(residual_, nullptr, 0, x_) : norm(x_, residual_, 2 * layer, x_);
    linear(model_.qkv, layer, x_, qkv_, model_.qkv_bias);
    const int64_t heads = model_.sizes.heads, kv_heads = model_.sizes.kv_heads, head_dim = model_.sizes.head_dim;
    char* keys = qkv_ + heads * head_dim * size_;
    if (model_.head_norms.data != nullptr) {
      head_norm(qkv_, heads, 2 * layer);
      head_norm(keys, kv_heads, 2 * layer + 1);
    }
    rope.q = qkv_;
    rope.k = keys;
    rope.v = keys + kv_heads * head_dim * size_;
    rope.kv = kv;
    if (num_rows_ > 0) kernels().rope_write(rope);
    attention.q = qkv_;
    attention.kv = kv;
    attention.out = attended_;
    run_attention(attention);
  }

  // Goes on with some of the rows only: the others have left their keys and values.
  void keep_rows(const int64_t* rows, int64_t count) {
    for (auto [buffer, spare, features] : {std::tuple(&attended_, &qkv_, model_.sizes.query()),
                                           std::tuple(&residual_, &gate_up_, model_.sizes.hidden)}) {
      const int64_t bytes = features * size_;
      for (int64_t i = 0; i < count; ++i) std::memcpy(*spare + i * bytes, *buffer + rows[i] * bytes, bytes);
      for (int64_t i = 0; i < count; ++i) std::memcpy(*buffer + i * bytes, *spare + i * bytes, bytes);
    }
    num_rows_ = count;
  }

  void feed_forward(int64_t layer) {
    linear(model_.attention_out, layer, attended_, x_, model_.attention_out_bias);
    norm(x_, residual_, 2 * layer + 1, x_);
    linear(model_.gate_up, layer, x_, gate_up_, model_.gate_up_bias);
    SiluMulArgs args{dtype_, num_rows_, model_.sizes.intermediate, gate_up_, 2 * model_.sizes.intermediate, gated_};
    kernels().silu_mul(args);
    linear(model_.down, layer, gated_, x_, model_.down_bias);
  }

  Tensor result() {
    Tensor out = empty_cpu({num_rows_, model_.sizes.hidden}, type_);
    norm(x_, residual_, 2 * model_.sizes.layers, static_cast<char*>(out.data_ptr()));
    return out;
  }

 private:
  static constexpr int64_t kAlign = 64;

  int64_t row_bytes() const {
    const Sizes& sizes = model_.sizes;
    return (2 * sizes.hidden + sizes.fused() + sizes.query() + 3 * sizes.intermediate) * size_;
  }

  // Adds x to the residual where there is one. The kernel reads a row before it writes it: it may work in place.
  void norm(const char* x, char* residual, int64_t index, char* out) {
    const int64_t hidden = model_.sizes.hidden;
    NormArgs args{dtype_, model_.norms.dtype, num_rows_, hidden, x, hidden, residual, hidden};
    args.weight = model_.norms[index];
    args.eps = model_.eps;
    args.out = out;
    args.total = residual;
    kernels().rms_norm(args);
  }

  void head_norm(char* heads, int64_t count, int64_t index) {
    const int64_t head_dim = model_.sizes.head_dim;
    for (int64_t row = 0; row < num_rows_; ++row) {
      char* x = heads + row * model_.sizes.fused() * size_;
      NormArgs args{dtype_, model_.head_norms.dtype, count, head_dim, x, head_dim};
      args.weight = model_.head_norms[index];
      args.eps = model_.eps;
      args.out = x;
      kernels().rms_norm(args);
    }
  }

  void linear(const Matrices& matrices, int64_t layer, const char* x, char* out, const Vectors& bias) {
    LinearArgs args{matrices.kind, dtype_, num_rows_, matrices.in_features, matrices.out_features};
    args.x = x;
    args.x_stride = matrices.in_features;
    args.panels = matrices.panels[layer];
    args.bias = bias[layer];
    args.bias_dtype = bias.dtype;
    args.out = out;
    run_linear(args);
  }

  const Model& model_;
  const ScalarType type_;
  const Dtype dtype_;
  const int64_t size_;
  int64_t num_rows_;
  Tensor memory_;
  char *x_, *residual_, *qkv_, *attended_, *gate_up_, *gated_;
};

// What the layers have in common; q, k, v and kv are set layer by layer.
RopeArgs rope_args(const Sizes& sizes, Dtype dtype, int64_t rows, const View& cos, const View& sin, const View& kv,
                   const View& slots) {
  RopeArgs args{dtype, float_dtype(cos, kOp, "cos"), float_dtype(kv, kOp, "kv")};
  for (const View* angle : {&cos, &sin}) {
    check_dim(*angle, 2, kOp, "cos and sin");
    SSD_CHECK(angle->type == cos.type, kOp, ": cos and sin must have one dtype");
    check_size(angle->sizes[0], rows, kOp, "the number of rows of cos and sin");
    check_size(angle->sizes[1], sizes.head_dim, kOp, "the last dimension of cos and sin");
  }
  check_int64(slots, 1, kOp, "slots");
  check_size(slots.sizes[0], rows, kOp, "the number of slots");
  for (int64_t row = 0; row < rows; ++row) check_range(integers(slots)[row], 0, kv.sizes[2], kOp, "slot");
  args.num_rows = rows;
  args.num_heads = sizes.heads;
  args.num_kv_heads = sizes.kv_heads;
  args.head_dim = sizes.head_dim;
  for (int64_t* strides : {args.q_strides, args.k_strides, args.v_strides}) {
    strides[0] = sizes.fused();
    strides[1] = sizes.head_dim;
  }
  args.cos = cos.data;
  args.sin = sin.data;
  args.cos_stride = cos.strides[0];
  args.sin_stride = sin.strides[0];
  for (int i = 0; i < 3; ++i) args.kv_strides[i] = kv.strides[i + 1];
  args.slots = integers(slots);
  return args;
}

AttentionArgs attention_args(const RopeArgs& rope, double scale) {
  AttentionArgs args{rope.dtype, rope.kv_dtype, rope.num_rows, rope.num_heads, rope.num_kv_heads, rope.head_dim};
  for (int i = 0; i < 2; ++i) args.q_strides[i] = rope.q_strides[i];
  for (int i = 0; i < 3; ++i) args.kv_strides[i] = rope.kv_strides[i];
  args.scale = static_cast<float>(scale);
  return args;
}

Sizes check_sizes(const View& embedding, const View& kv, int64_t num_heads, int64_t intermediate) {
  check_dim(embedding, 2, kOp, "embedding");
  check_dim(kv, 5, kOp, "kv");
  check_size(kv.sizes[1], 2, kOp, "the second dimension of kv");
  const Sizes sizes{kv.sizes[0], embedding.sizes[1], num_heads, kv.sizes[3], kv.sizes[4], intermediate};
  SSD_CHECK(sizes.layers > 0 && intermediate > 0, kOp, ": a decoder has layers, and they have features");
  SSD_CHECK(sizes.kv_heads > 0 && num_heads > 0 && num_heads % sizes.kv_heads == 0, kOp, ": ", num_heads,
            " query heads are no multiple of ", sizes.kv_heads, " key-value heads");
  SSD_CHECK(sizes.head_dim % 2 == 0, kOp, ": the head dimension must be even, not ", sizes.head_dim);
  return sizes;
}

Tensor decoder_layers_(const Tensor& embedding, const Tensor& tokens, const Tensor& cos, const Tensor& sin,
                       const Tensor& kv, const Tensor& slots, const Tensor& sequence, const Tensor& tables,
                       const Tensor& prefix, const Tensor& chain, const std::optional<Tensor>& logit_rows, double scale,
                       const std::string& weights, int64_t num_heads, int64_t intermediate, double eps,
                       const Tensor& norms, const std::optional<Tensor>& head_norms, const std::vector<Tensor>& qkv,
                       const std::optional<Tensor>& qkv_bias, const std::vector<Tensor>& attention_out,
                       const std::optional<Tensor>& attention_out_bias, const std::vector<Tensor>& gate_up,
                       const std::optional<Tensor>& gate_up_bias, const std::vector<Tensor>& down,
                       const std::optional<Tensor>& down_bias) {
  const View table(embedding), token(tokens), cache(kv);
  const Dtype dtype = float_dtype(table, kOp, "embedding");
  const Sizes sizes = check_sizes(table, cache, num_heads, intermediate);
  const int64_t layers = sizes.layers, hidden = sizes.hidden;
  const Weights kind = weights_named(weights);
  const Model model{sizes,
                    static_cast<float>(eps),
                    Vectors(norms, 2 * layers + 1, hidden, "norms"),
                    Vectors(head_norms, 2 * layers, sizes.head_dim, "head_norms"),
                    Vectors(qkv_bias, layers, sizes.fused(), "qkv_bias"),
                    Vectors(attention_out_bias, layers, hidden, "attention_out_bias"),
                    Vectors(gate_up_bias, layers, 2 * intermediate, "gate_up_bias"),
                    Vectors(down_bias, layers, hidden, "down_bias"),
                    Matrices(kind, qkv, layers, hidden, sizes.fused(), "qkv"),
                    Matrices(kind, attention_out, layers, sizes.query(), hidden, "attention_out"),
                    Matrices(kind, gate_up, layers, hidden, 2 * intermediate, "gate_up"),
                    Matrices(kind, down, layers, intermediate, hidden, "down")};
  check_int64(token, 1, kOp, "tokens");
  const int64_t rows = token.sizes[0];
  const RopeArgs rope = rope_args(sizes, dtype, rows, View(cos), View(sin), cache, View(slots));
  AttentionArgs attention = attention_args(rope, scale);
  set_visible(attention, sequence, tables, prefix, chain, cache.sizes[2], kOp);

  const int64_t* wanted = nullptr;
  int64_t num_wanted = rows;
  if (logit_rows.has_value()) {
    const View view(*logit_rows);
    check_int64(view, 1, kOp, "logit_rows");
    wanted = integers(view);
    num_wanted = view.sizes[0];
    for (int64_t i = 0; i < num_wanted; ++i) check_range(wanted[i], 0, rows, kOp, "logit row");
  }

  Walk walk(model, table.type, dtype, rows, std::max(rows, num_wanted));
  walk.embed(table, integers(token));
  for (int64_t layer = 0; layer < layers; ++layer) {
    walk.attend(layer, rope, attention, cache.data + layer * cache.strides[0] * bytes_of(rope.kv_dtype));
    if (layer + 1 == layers && logit_rows.has_value()) walk.keep_rows(wanted, num_wanted);
    walk.feed_forward(layer);
  }
  return walk.result();
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(ssd_runtime, m) {
  m.def(
      "decoder_layers_(Tensor embedding, Tensor tokens, Tensor cos, Tensor sin, Tensor(a!) kv, Tensor slots,"
      " Tensor sequence, Tensor tables, Tensor prefix, Tensor chain, Tensor? logit_rows, float scale, str weights,"
      " int num_heads, int intermediate_size, float eps, Tensor norms, Tensor? head_norms, Tensor[] qkv,"
      " Tensor? qkv_bias, Tensor[] attention_out, Tensor? attention_out_bias, Tensor[] gate_up,"
      " Tensor? gate_up_bias, Tensor[] down, Tensor? down_bias) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(ssd_runtime, CPU, m) { m.impl("decoder_layers_", TORCH_BOX(&decoder_layers_)); }
