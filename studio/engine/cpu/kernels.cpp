// What a step computes on a CPU, where calls would cost as much as the arithmetic: the halves of a decoder layer as
// engine/parts.py has them, attention as engine/blocks.py has it, the loss of engine/head.py, and the length of the
// gradient. The products are PyTorch's; what stands between them are single loops.
//
// Tensors are (tokens, width), bfloat16 or float32; sums are float32. What learns (`lora`, its gradients) is float32.

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/custom_class.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>
#include <tuple>
#include <vector>

#include "arena.h"
#include "attention.h"
#include "numbers.h"
#include "tiles.h"

namespace {

using at::Tensor;
using namespace numbers;
using Tensors = std::vector<Tensor>;
using Lengths = std::vector<int64_t>;

constexpr int64_t GRAIN = 16384;  // numbers that one thread takes at least
// As in parts.py.
constexpr int64_t SHARED_ROWS = 512;
constexpr int64_t FEW_THREADS = 4;
constexpr int64_t ALIGNED = 32;

template <typename Run> void over_rows(int64_t rows, int64_t width, Run run) {
  at::parallel_for(0, rows, std::max<int64_t>(1, GRAIN / std::max<int64_t>(1, width)), [&](int64_t from, int64_t to) {
    for (int64_t row = from; row < to; ++row) run(row);
  });
}

// out = factor · in, both with rows of `width` numbers.
template <typename To, typename From>
void convert(To* out, int64_t out_stride, const From* in, int64_t in_stride, int64_t rows, int64_t width, float factor) {
  over_rows(rows, width, [&](int64_t row) {
    To* to = out + row * out_stride;
    const From* from = in + row * in_stride;
#pragma omp simd
    for (int64_t i = 0; i < width; ++i) to[i] = narrow<To>(factor * wide(from[i]));
  });
}

void copy_rows(const Tensor& from, const Tensor& to) {
  const int64_t bytes = from.size(1) * from.element_size();
  const int64_t from_apart = from.stride(0) * from.element_size(), to_apart = to.stride(0) * to.element_size();
  const char* in = start<char>(from);
  char* out = start<char>(to);
  over_rows(from.size(0), from.size(1), [&](int64_t row) { std::memcpy(out + row * to_apart, in + row * from_apart, bytes); });
}

// A copy of rows that may be apart from each other.
Tensor copied(const Tensor& x) {
  Tensor out = at::empty(x.sizes(), x.options());
  copy_rows(x, out);
  return out;
}

// ---- what stands between the products

std::tuple<Tensor, Tensor> norm(const Tensor& x, const Tensor& weight, double epsilon) {
  const int64_t rows = x.size(0), width = x.size(1);
  Tensor out = at::empty_like(x), scale = at::empty({rows, 1}, x.options().dtype(at::kFloat));
  by_type(x, [&](auto kind) {
    using T = decltype(kind);
    const T *states = start<T>(x), *factor = start<T>(weight);
    T* result = start<T>(out);
    float* scales = start<float>(scale);
    over_rows(rows, width, [&](int64_t row) {
      const T* from = states + row * width;
      T* to = result + row * width;
      float sum = 0;
#pragma omp simd reduction(+ : sum)
      for (int64_t i = 0; i < width; ++i) sum += wide(from[i]) * wide(from[i]);
      const float by = 1.0f / std::sqrt(sum / width + static_cast<float>(epsilon));
      scales[row] = by;
#pragma omp simd
      for (int64_t i = 0; i < width; ++i) to[i] = narrow<T>(as<T>(wide(from[i]) * by) * wide(factor[i]));
    });
  });
  return {out, scale};
}

// A function of its own: in the loop over rows GCC 12 does not make vector instructions of it.
template <typename T>
__attribute__((noinline)) float sum_of_products(const T* d, const T* factor, const T* x, int64_t width) {
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < width; ++i) sum += as<T>(wide(d[i]) * wide(factor[i])) * wide(x[i]);
  return sum;
}

// The gradient of `norm` at x, and `more` added to it where that is given. Also into `beside`, where that is given.
Tensor norm_gradient(
    const Tensor& gradient, const Tensor& x, const Tensor& weight, const Tensor& scale, const Tensor& more,
    const Tensor& beside = Tensor()) {
  const int64_t rows = x.size(0), width = x.size(1);
  Tensor out = at::empty_like(x);
  by_type(x, [&](auto kind) {
    using T = decltype(kind);
    const T *d = start<T>(gradient), *states = start<T>(x), *factor = start<T>(weight);
    const T* added = more.defined() ? start<T>(more) : nullptr;
    const float* scales = start<float>(scale);
    T *result = start<T>(out), *copies = beside.defined() ? start<T>(beside) : nullptr;
    const int64_t stride = beside.defined() ? beside.stride(0) : 0;
    over_rows(rows, width, [&](int64_t row) {
      const T *own = d + row * width, *from = states + row * width;
      T* to = result + row * width;
      const float by = scales[row], along = sum_of_products(own, factor, from, width) * by * by / width;
#pragma omp simd
      for (int64_t i = 0; i < width; ++i)
        to[i] = narrow<T>((as<T>(wide(own[i]) * wide(factor[i])) - wide(from[i]) * along) * by);
      if (added != nullptr) {
        const T* also = added + row * width;
#pragma omp simd
        for (int64_t i = 0; i < width; ++i) to[i] = narrow<T>(wide(to[i]) + wide(also[i]));
      }
      if (copies != nullptr) std::memcpy(copies + row * stride, to, width * sizeof(T));
    });
  });
  return out;
}

// x + y, rows of both apart from each other as they are.
Tensor sum(const Tensor& x, const Tensor& y) {
  const int64_t rows = x.size(0), width = x.size(1), x_apart = x.stride(0), y_apart = y.stride(0);
  Tensor out = at::empty({rows, width}, x.options());
  by_type(x, [&](auto kind) {
    using T = decltype(kind);
    const T *first = start<T>(x), *second = start<T>(y);
    T* result = start<T>(out);
    over_rows(rows, width, [&](int64_t row) {
      const T *one = first + row * x_apart, *other = second + row * y_apart;
      T* to = result + row * width;
#pragma omp simd
      for (int64_t i = 0; i < width; ++i) to[i] = narrow<T>(wide(one[i]) + wide(other[i]));
    });
  });
  return out;
}

inline float sigmoid(float x) { return 1.0f / (1.0f + power(-x)); }

// silu(gate) · up of rows with both side by side.
Tensor gated(const Tensor& both) {
  const int64_t rows = both.size(0), width = both.size(1) / 2, stride = both.stride(0);
  Tensor out = at::empty({rows, width}, both.options());
  by_type(both, [&](auto kind) {
    using T = decltype(kind);
    const T* states = start<T>(both);
    T* result = start<T>(out);
    over_rows(rows, width, [&](int64_t row) {
      const T *gate = states + row * stride, *up = gate + width;
      T* to = result + row * width;
#pragma omp simd
      for (int64_t i = 0; i < width; ++i) to[i] = narrow<T>(as<T>(wide(gate[i]) * sigmoid(wide(gate[i]))) * wide(up[i]));
    });
  });
  return out;
}

// Into `out`, rows as `both` is: the gradient of `gated`.
void gated_gradient(const Tensor& gradient, const Tensor& both, const Tensor& out) {
  const int64_t rows = both.size(0), width = both.size(1) / 2, stride = both.stride(0), out_stride = out.stride(0);
  by_type(both, [&](auto kind) {
    using T = decltype(kind);
    const T *states = start<T>(both), *d = start<T>(gradient);
    T* result = start<T>(out);
    over_rows(rows, width, [&](int64_t row) {
      const T *gate = states + row * stride, *up = gate + width, *own = d + row * width;
      T *d_gate = result + row * out_stride, *d_up = d_gate + width;
#pragma omp simd
      for (int64_t i = 0; i < width; ++i) {
        const float x = wide(gate[i]), chance = sigmoid(x);
        d_up[i] = narrow<T>(as<T>(x * chance) * wide(own[i]));
        d_gate[i] = narrow<T>(as<T>(wide(own[i]) * wide(up[i])) * chance * (1.0f + x * (1.0f - chance)));
      }
    });
  });
}

// Heads in a row, `width` numbers each, turned by the angles of their token; back where `sign` is -1.
template <typename T>
void turn(T* out, const T* in, const T* cos, const T* sin, int64_t heads, int64_t width, float sign) {
  const int64_t half = width / 2;
  for (int64_t head = 0; head < heads; ++head, out += width, in += width) {
    // Forwards the second half's sines go with the first half's numbers; backwards they change places.
    const T *low = sign > 0 ? sin : sin + half, *high = sign > 0 ? sin + half : sin;
#pragma omp simd
    for (int64_t i = 0; i < half; ++i) {
      const float first = wide(in[i]), second = wide(in[half + i]);
      out[i] = narrow<T>(first * wide(cos[i]) - sign * second * wide(low[i]));
      out[half + i] = narrow<T>(second * wide(cos[half + i]) + sign * first * wide(high[i]));
    }
  }
}

// ---- products

// total = x @ weight, in pieces that are shared among few threads.
void product(const Tensor& total, const Tensor& x, const Tensor& weight) {
  const bool pieces = weight.size(1) < weight.size(0) && at::get_num_threads() > 1 && at::get_num_threads() <= FEW_THREADS;
  const int64_t rows = x.size(0), size = pieces ? SHARED_ROWS : rows;
  for (int64_t from = 0; from < rows; from += size) {
    const int64_t to = std::min(rows, from + size);
    Tensor out = total.slice(0, from, to);
    at::mm_out(out, x.slice(0, from, to), weight);
  }
}

// xW + s·xAB of layers that read the same, as parts.Linears has them joined.
struct Linears : torch::CustomClassHolder {
  Tensor whole, up, bias;  // `bias` is empty where there is none
  Lengths widths, ranks;
  int64_t width, room;
  double scaling;

  Linears(Tensor whole, Tensor up, Tensor bias, Lengths widths, Lengths ranks, double scaling)
      : whole(std::move(whole)), up(std::move(up)), bias(std::move(bias)), widths(std::move(widths)),
        ranks(std::move(ranks)), width(this->up.size(0)), room(this->up.size(1)), scaling(scaling) {}

  // (result with room beside it, xA)
  std::tuple<Tensor, Tensor> forward(const Tensor& x, const Tensor* lora) const {
    cast(lora);
    Tensor both = at::empty({x.size(0), width + room}, x.options());
    product(both, x, whole.t());
    Tensor through = copied(both.slice(1, width)), out = both.slice(1, 0, width);
    if (bias.numel() > 0) out.add_(bias);
    return {out.addmm_(through, up.t()), through};
  }

  // Columns for the gradient, and beside them room for that of xA.
  Tensor make_room(const Tensor& like) const {
    Tensor both = at::empty({like.size(0), width + room}, like.options());
    if (width % ALIGNED != 0) both.slice(1, width).zero_();  // as in parts.py
    return both;
  }

  // The gradient at x (none unless `below`), and at the end of `d_lora` that of A and B of each layer.
  Tensor backward(const Tensor& both, const Tensor& x, const Tensor& through, bool below, Tensors& d_lora) const {
    Tensor gradient = both.slice(1, 0, width), d_through = both.slice(1, width);
    tiles::product(d_through, gradient, up);
    add_gradients(gradient, d_through, x, through, d_lora);
    if (!below) return Tensor();
    Tensor d_x = at::empty_like(x);
    product(d_x, both, whole);
    return d_x;
  }

  int64_t num_lora() const { return 2 * static_cast<int64_t>(ranks.size()); }

 private:
  // s·A and B as they are now, where the products find them: in few numbers each, shared among threads at once.
  void cast(const Tensor* lora) const {
    by_type(whole, [&](auto kind) {
      using T = decltype(kind);
      struct Piece { const float* from; T* to; int64_t rows, width, apart; float factor; };
      std::vector<Piece> pieces;
      const auto add = [&](const Tensor& own, T* to, int64_t apart, float factor) {
        const int64_t rows = own.size(0), numbers = own.size(1), most = std::max<int64_t>(1, GRAIN / 2 / numbers);
        for (int64_t row = 0; row < rows; row += most) {
          const float* from = start<float>(own) + row * numbers;
          pieces.push_back({from, to + row * apart, std::min(most, rows - row), numbers, apart, factor});
        }
      };
      const int64_t reads = whole.size(1), num = static_cast<int64_t>(ranks.size());
      T *down = start<T>(whole) + width * reads, *ups = start<T>(up);
      for (int64_t each = 0; each < num; ++each) {
        add(lora[each], down, reads, scaling);
        add(lora[num + each], ups, room, 1);
        down += ranks[each] * reads;
        ups += widths[each] * room + ranks[each];
      }
      at::parallel_for(0, static_cast<int64_t>(pieces.size()), 2, [&](int64_t first, int64_t last) {
        for (int64_t each = first; each < last; ++each) {
          auto [from, to, rows, numbers, apart, factor] = pieces[each];
          for (int64_t row = 0; row < rows; ++row, from += numbers, to += apart) {
#pragma omp simd
            for (int64_t i = 0; i < numbers; ++i) to[i] = narrow<T>(factor * from[i]);
          }
        }
      });
    });
  }

  // A of all layers in one tensor, of which each has rows of its own.
  void add_gradients(
      const Tensor& gradient, const Tensor& d_through, const Tensor& x, const Tensor& through, Tensors& d_lora) const {
    const int64_t num = static_cast<int64_t>(ranks.size());
    const int64_t sum = std::accumulate(ranks.begin(), ranks.end(), int64_t{0});
    const auto options = whole.options().dtype(at::kFloat);
    Tensor d_down = at::empty({sum, x.size(1)}, options);
    tiles::product(d_down, d_through.slice(1, 0, sum).t(), x, scaling);
    for (int64_t each = 0, rank = 0; each < num; rank += ranks[each++]) {
      d_lora.push_back(d_down.slice(0, rank, rank + ranks[each]));
    }
    for (int64_t each = 0, rank = 0, column = 0; each < num; rank += ranks[each], column += widths[each++]) {
      const Tensor own = through.slice(1, rank, rank + ranks[each]).t();
      Tensor d_up = at::empty({widths[each], ranks[each]}, options);
      tiles::product(d_up.t(), own, gradient.slice(1, column, column + widths[each]));
      d_lora.push_back(d_up);
    }
  }
};

using Layers = c10::intrusive_ptr<Linears>;

// ---- the halves

// From a layer's input (tokens, width) to query and key, turned, and value: each (tokens, heads, width of one).
struct Heads : torch::CustomClassHolder {
  Layers layers;
  Tensor weight;
  double epsilon;

  Heads(Layers layers, Tensor weight, double epsilon)
      : layers(std::move(layers)), weight(std::move(weight)), epsilon(epsilon) {}

  // First query, key and value, then what the way back needs.
  Tensors forward(const Tensor& x, const Tensor& cos, const Tensor& sin, const Tensors& lora) const {
    Tensor own = x.contiguous();
    auto [normed, scale] = norm(own, weight, epsilon);
    auto [states, through] = layers->forward(normed, lora.data());
    const int64_t rows = x.size(0), size = cos.size(1), stride = states.stride(0);
    Tensors heads;
    for (int64_t each : layers->widths) heads.push_back(at::empty({rows, each / size, size}, x.options()));
    Tensor own_cos = cos.to(x.scalar_type()).contiguous(), own_sin = sin.to(x.scalar_type()).contiguous();
    by_type(x, [&](auto kind) {
      using T = decltype(kind);
      T *query = start<T>(heads[0]), *key = start<T>(heads[1]), *value = start<T>(heads[2]);
      const T *from = start<T>(states), *cosines = start<T>(own_cos), *sines = start<T>(own_sin);
      const Lengths& widths = layers->widths;
      over_rows(rows, stride, [&](int64_t row) {
        const T *in = from + row * stride, *c = cosines + row * size, *s = sines + row * size;
        turn(query + row * widths[0], in, c, s, widths[0] / size, size, 1);
        turn(key + row * widths[1], in + widths[0], c, s, widths[1] / size, size, 1);
        std::memcpy(value + row * widths[2], in + widths[0] + widths[1], widths[2] * sizeof(T));
      });
    });
    return {heads[0], heads[1], heads[2], own_cos, own_sin, own, scale, normed, through};
  }

  // The gradient at x (empty unless `below`), then those at what learns.
  Tensors backward(const Tensor& query, const Tensor& key, const Tensor& value, const Tensors& kept, bool below) const {
    return backward_and(query, key, value, kept, below, Tensor());
  }

  // As `backward`, `more` added to the gradient at x.
  Tensors backward_and(
      const Tensor& query, const Tensor& key, const Tensor& value, const Tensors& kept, bool below,
      const Tensor& more) const {
    const Tensor &cos = kept[0], &sin = kept[1], &x = kept[2], &scale = kept[3], &normed = kept[4], &through = kept[5];
    const int64_t rows = x.size(0), size = cos.size(1);
    Tensor both = layers->make_room(x);
    Tensor own[] = {query.contiguous(), key.contiguous(), value.contiguous()};
    by_type(x, [&](auto kind) {
      using T = decltype(kind);
      const T *d_query = start<T>(own[0]), *d_key = start<T>(own[1]), *d_value = start<T>(own[2]);
      const T *cosines = start<T>(cos), *sines = start<T>(sin);
      T* to = start<T>(both);
      const int64_t stride = both.stride(0);
      const Lengths& widths = layers->widths;
      over_rows(rows, stride, [&](int64_t row) {
        T* out = to + row * stride;
        const T *c = cosines + row * size, *s = sines + row * size;
        turn(out, d_query + row * widths[0], c, s, widths[0] / size, size, -1);
        turn(out + widths[0], d_key + row * widths[1], c, s, widths[1] / size, size, -1);
        std::memcpy(out + widths[0] + widths[1], d_value + row * widths[2], widths[2] * sizeof(T));
      });
    });
    Tensors d_lora;
    Tensor d_normed = layers->backward(both, normed, through, below, d_lora);
    Tensor d_x = below ? norm_gradient(d_normed, x, weight, scale, more) : at::empty({0}, x.options());
    d_lora.insert(d_lora.begin(), d_x);
    return d_lora;
  }
};

// What a layer does after its attention: x + o(attended), then that + mlp(norm(that)).
struct Rest : torch::CustomClassHolder {
  Layers out, gate_up, down;
  Tensor weight;
  double epsilon;

  Rest(Layers out, Layers gate_up, Layers down, Tensor weight, double epsilon)
      : out(std::move(out)), gate_up(std::move(gate_up)), down(std::move(down)), weight(std::move(weight)),
        epsilon(epsilon) {}

  Tensors forward(const Tensor& x, const Tensor& attended, const Tensors& lora) const {
    const Tensor* learns = lora.data();
    Tensor own = attended.contiguous();
    auto [between, through_out] = out->forward(own, learns);
    between = sum(between, x);
    auto [normed, scale] = norm(between, weight, epsilon);
    auto [both, through_both] = gate_up->forward(normed, learns + out->num_lora());
    Tensor hidden = gated(both);
    auto [result, through_down] = down->forward(hidden, learns + out->num_lora() + gate_up->num_lora());
    result = sum(result, between);
    return {result, own, through_out, between, scale, normed, through_both, both, hidden, through_down};
  }

  // The gradients at x and at what was attended, then those at what learns.
  Tensors backward(const Tensor& gradient, const Tensors& kept) const {
    const Tensor &attended = kept[0], &through_out = kept[1], &between = kept[2], &scale = kept[3], &normed = kept[4],
                 &through_both = kept[5], &both = kept[6], &hidden = kept[7], &through_down = kept[8];
    Tensor own = gradient.contiguous();
    Tensors d_out, d_gate_up, d_down;
    Tensor d_result = down->make_room(own);
    copy_rows(own, d_result.slice(1, 0, down->width));
    Tensor d_hidden = down->backward(d_result, hidden, through_down, true, d_down);
    Tensor d_both = gate_up->make_room(own);
    gated_gradient(d_hidden, both, d_both);
    Tensor d_normed = gate_up->backward(d_both, normed, through_both, true, d_gate_up);
    Tensor d_outside = out->make_room(own);
    Tensor d_between = norm_gradient(d_normed, between, weight, scale, own, d_outside);
    Tensor d_attended = out->backward(d_outside, attended, through_out, true, d_out);
    Tensors all = {d_between, d_attended};
    for (const Tensors& each : {d_out, d_gate_up, d_down}) all.insert(all.end(), each.begin(), each.end());
    return all;
  }
};

// ---- attention over blocks of a row, as engine/blocks.py has it

// Rows `at` of (number, numbers) states, as numbers of `to`; zeros where `hidden` says so, row for row of a head.
Tensor take(const Tensor& states, const Tensor& at, at::ScalarType to, const Tensor* hidden = nullptr) {
  const int64_t rows = at.size(0), width = states.size(1);
  Tensor out = at::empty({rows, width}, states.options().dtype(to));
  const int64_t* places = start<int64_t>(at);
  const bool* hides = hidden ? start<bool>(*hidden) : nullptr;
  const int64_t period = hidden ? hidden->numel() : 1;
  by_type(states, [&](auto kind) {
    using From = decltype(kind);
    by_type(out, [&](auto other) {
      using To = decltype(other);
      const From* in = start<From>(states);
      To* result = start<To>(out);
      over_rows(rows, width, [&](int64_t row) {
        To* to_row = result + row * width;
        if (hides != nullptr && hides[row % period]) {
          std::fill_n(to_row, width, To{});
          return;
        }
        const From* from = in + places[row] * width;
#pragma omp simd
        for (int64_t i = 0; i < width; ++i) to_row[i] = narrow<To>(wide(from[i]));
      });
    });
  });
  return out;
}

// softmax(scaling · scores + bias), as numbers of `to`. scores: (heads · blocks, size · heads a key head, keys), float32.
Tensor chances_of(const Tensor& scores, const Tensor& bias, double scaling, at::ScalarType to) {
  const int64_t blocks = bias.size(0), size = bias.size(1), keys = scores.size(2), shared = scores.size(1) / size;
  Tensor out = at::empty(scores.sizes(), scores.options().dtype(to));
  float* in = start<float>(scores);
  const float *added = start<float>(bias), factor = scaling;
  by_type(out, [&](auto kind) {
    using T = decltype(kind);
    T* result = start<T>(out);
    over_rows(scores.size(0) * scores.size(1), 4 * keys, [&](int64_t row) {
      const float* hidden = added + (row / (size * shared) % blocks * size + row / shared % size) * keys;
      softmax(in + row * keys, hidden, factor, keys, keys, result + row * keys);
    });
  });
  return out;
}

// In place of `d`: the gradient at the scores, from that at what `chances_of` gave.
void scores_gradient(const Tensor& d, const Tensor& chances, double scaling) {
  const int64_t keys = d.size(2);
  const float factor = scaling;
  by_type(d, [&](auto kind) {
    using T = decltype(kind);
    T* gradient = start<T>(d);
    const T* given = start<T>(chances);
    over_rows(d.size(0) * d.size(1), 2 * keys, [&](int64_t row) {
      softmax_gradient(gradient + row * keys, given + row * keys, factor, keys, gradient + row * keys);
    });
  });
}

// Add rows (sums, key heads · keys, width) to rows `at` of a float32 total (tokens · key heads, width); each head has
// its own.
void add_rows(const Tensor& total, const Tensor& at, const Tensor& states, int64_t heads, int64_t sums = 1) {
  const int64_t width = total.size(1), rows = at.size(0) / heads;
  const int64_t* places = start<int64_t>(at);
  float* totals = start<float>(total);
  by_type(states, [&](auto kind) {
    using T = decltype(kind);
    const T* in = start<T>(states);
    at::parallel_for(0, heads, 1, [&](int64_t from, int64_t to) {
      for (int64_t row = from * rows; row < to * rows; ++row) {
        float* sum = totals + places[row] * width;
        for (int64_t each = 0; each < sums; ++each) {
          const T* own = in + (each * heads * rows + row) * width;
#pragma omp simd
          for (int64_t i = 0; i < width; ++i) sum[i] += wide(own[i]);
        }
      }
    });
  });
}

// The blocks of a row for a number of key heads: by group, which rows of states its tokens and keys are, what is added
// to its scores and what is padding; `results` says where each (token, key head) stands among the groups' results.
struct Blocks : torch::CustomClassHolder {
  Tensors tokens, keys, biases, paddings;
  Tensor results, elsewhere;
  int64_t heads;
  double scaling;

  Blocks(Tensors tokens, Tensors keys, Tensors biases, Tensors paddings, Tensor results, Tensor elsewhere, int64_t heads,
         double scaling)
      : tokens(std::move(tokens)), keys(std::move(keys)), biases(std::move(biases)), paddings(std::move(paddings)),
        results(std::move(results)), elsewhere(std::move(elsewhere)), heads(heads), scaling(scaling) {}

  // The result (tokens, heads, width); where it `keeps`, then by group how much each token takes of what it sees.
  Tensors forward(const Tensor& query, const Tensor& key, const Tensor& value, bool keeps) const {
    const Tensor asks = rows_of(query), offers = rows_of(key), holds = rows_of(value);
    Tensors kept = {Tensor()}, found;
    for (size_t group = 0; group < tokens.size(); ++group) {
      if (fit_tiles(offers, holds)) {
        auto [out, shares] = by_tiles(group, asks, offers, holds, keeps);
        found.push_back(out);
        if (keeps) kept.push_back(shares);
        continue;
      }
      Tensor own = chances(asks, offers, group);
      Tensor values = take(holds, keys[group], holds.scalar_type()).view({batch(group), -1, holds.size(1)});
      found.push_back(at::bmm(own, values).view({tokens[group].size(0), -1}));
      if (keeps) kept.push_back(own);
    }
    kept[0] = take(joined(found), results, query.scalar_type()).view({query.size(0), query.size(1), value.size(2)});
    return kept;
  }

  // The gradients at query, key and value. `kept`: by group what `forward` gave, or none, and it is computed again.
  Tensors backward(
      const Tensor& gradient, const Tensor& query, const Tensor& key, const Tensor& value, const Tensors& kept) const {
    const Tensor asks = rows_of(query), offers = rows_of(key), holds = rows_of(value), wide_gradient = rows_of(gradient);
    const auto type = query.scalar_type();
    Tensor d_key = at::zeros(offers.sizes(), offers.options().dtype(at::kFloat));
    Tensor d_value = at::zeros(holds.sizes(), d_key.options());
    Tensors found;
    for (size_t group = 0; group < tokens.size(); ++group) {
      if (fit_tiles(offers, holds)) {
        const Tensor shares = kept.empty() ? Tensor() : kept[group];
        found.push_back(gradient_by_tiles(group, wide_gradient, asks, offers, holds, shares, d_key, d_value));
        continue;
      }
      const Tensor own = kept.empty() ? chances(asks, offers, group) : kept[group];
      const int64_t number = batch(group), width = offers.size(1);
      Tensor asked = take(asks, tokens[group], type).view({number, -1, width});
      Tensor offered = take(offers, keys[group], type).view({number, -1, width});
      Tensor values = take(holds, keys[group], type).view({number, -1, holds.size(1)});
      Tensor wanted = take(wide_gradient, tokens[group], type, &paddings[group]).view({number, -1, holds.size(1)});
      add_rows(d_value, keys[group], at::bmm(own.transpose(1, 2), wanted), heads);
      Tensor d_scores = at::bmm(wanted, values.transpose(1, 2));
      scores_gradient(d_scores, own, scaling);
      found.push_back(at::bmm(d_scores, offered).view({tokens[group].size(0), -1}));
      add_rows(d_key, keys[group], at::bmm(d_scores.transpose(1, 2), asked), heads);
    }
    Tensor d_query = take(joined(found), results, type);
    if (elsewhere.numel() > 0) d_query.index_fill_(0, elsewhere, 0);
    return {d_query.view(query.sizes()), narrowed(d_key, type).view(key.sizes()), narrowed(d_value, type).view(value.sizes())};
  }

 private:
  // (tokens · key heads, numbers): heads that share a key in one row.
  Tensor rows_of(const Tensor& states) const { return states.contiguous().view({states.size(0) * heads, -1}); }

  static bool fit_tiles(const Tensor& offers, const Tensor& holds) {
    return tiles::fit(offers) && offers.size(1) % tiles::STEP == 0 && holds.size(1) % tiles::STEP == 0;
  }

  attention::Group of(size_t group, const Tensor& asks, const Tensor& offers, const Tensor& holds) const {
    const Tensor& bias = biases[group];
    const int64_t width = offers.size(1);
    return {start<int64_t>(tokens[group]), start<int64_t>(keys[group]), start<float>(bias), start<bool>(paddings[group]),
            heads, bias.size(0), bias.size(1), bias.size(3), asks.size(1) / width, width, holds.size(1),
            static_cast<float>(scaling)};
  }

  // A group's result, and where it `keeps` what each token takes.
  std::tuple<Tensor, Tensor> by_tiles(
      size_t group, const Tensor& asks, const Tensor& offers, const Tensor& holds, bool keeps) const {
    const attention::Group own = of(group, asks, offers, holds);
    Tensor out = at::empty({tokens[group].size(0), own.shared * own.value_width}, asks.options()), shares;
    if (keeps) shares = at::empty({own.batches(), own.rows(), own.pitch()}, asks.options());
    attention::forward(
        own, start<Half>(asks), start<Half>(offers), start<Half>(holds), keeps ? start<Half>(shares) : nullptr,
        start<Half>(out));
    return {out, shares};
  }

  // That at the query of a group's tokens; those at key and value are added. `shares`: what was kept, or undefined.
  Tensor gradient_by_tiles(
      size_t group, const Tensor& gradient, const Tensor& asks, const Tensor& offers, const Tensor& holds,
      const Tensor& shares, const Tensor& d_key, const Tensor& d_value) const {
    const attention::Group own = of(group, asks, offers, holds);
    const int64_t num_keys = keys[group].size(0);
    Tensor d_asks = at::empty({tokens[group].size(0), own.shared * own.width}, asks.options());
    Tensor d_offers = at::empty({own.sums(), num_keys, own.width}, d_key.options());
    Tensor d_holds = at::empty({own.sums(), num_keys, own.value_width}, d_key.options());
    attention::backward(
        own, start<Half>(gradient), start<Half>(asks), start<Half>(offers), start<Half>(holds),
        shares.defined() ? start<Half>(shares) : nullptr, start<Half>(d_asks), start<float>(d_offers),
        start<float>(d_holds));
    add_rows(d_key, keys[group], d_offers, heads, own.sums());
    add_rows(d_value, keys[group], d_holds, heads, own.sums());
    return d_asks;
  }

  int64_t batch(size_t group) const { return heads * biases[group].size(0); }

  static Tensor narrowed(const Tensor& states, at::ScalarType type) {
    if (type == at::kFloat) return states;
    Tensor out = at::empty(states.sizes(), states.options().dtype(type));
    convert(start<Half>(out), out.size(1), start<float>(states), out.size(1), out.size(0), out.size(1), 1);
    return out;
  }

  static Tensor joined(const Tensors& found) { return found.size() == 1 ? found[0] : at::cat(found); }

  // Scores are float32 whatever the numbers are, as in blocks.py.
  Tensor chances(const Tensor& asks, const Tensor& offers, size_t group) const {
    const int64_t width = offers.size(1);
    Tensor asked = take(asks, tokens[group], at::kFloat).view({batch(group), -1, width});
    Tensor offered = take(offers, keys[group], at::kFloat).view({batch(group), -1, width});
    return chances_of(at::bmm(asked, offered.transpose(1, 2)), biases[group], scaling, asks.scalar_type());
  }
};

// ---- a whole layer

// Both halves of a layer and the attention between them, over the blocks of a row.
struct Layer : torch::CustomClassHolder {
  c10::intrusive_ptr<Heads> heads;
  c10::intrusive_ptr<Rest> rest;

  Layer(c10::intrusive_ptr<Heads> heads, c10::intrusive_ptr<Rest> rest) : heads(std::move(heads)), rest(std::move(rest)) {}

  // First the result, then what the way back needs.
  Tensors forward(
      const Tensor& x, const Tensor& cos, const Tensor& sin, const c10::intrusive_ptr<Blocks>& blocks, bool keeps,
      const Tensors& lora) const {
    const auto first_of_rest = lora.begin() + heads->layers->num_lora();
    const Tensors of_heads = heads->forward(x, cos, sin, Tensors(lora.begin(), first_of_rest));
    const Tensors attended = blocks->forward(of_heads[0], of_heads[1], of_heads[2], keeps);
    Tensors all = rest->forward(x, attended[0].view({x.size(0), -1}), Tensors(first_of_rest, lora.end()));
    TORCH_CHECK(all.size() == 1 + OF_REST && of_heads.size() == OF_HEADS, "what the halves keep");
    all.insert(all.end(), of_heads.begin(), of_heads.end());
    all.insert(all.end(), attended.begin() + 1, attended.end());
    return all;
  }

  // The gradient at x (empty unless `below`), then those at what learns.
  Tensors backward(
      const Tensor& gradient, const c10::intrusive_ptr<Blocks>& blocks, const Tensors& kept, bool below) const {
    const auto row = kept.begin() + OF_REST, chances = row + OF_HEADS;
    const Tensor &query = row[0], &key = row[1], &value = row[2];
    const Tensors d_rest = rest->backward(gradient, Tensors(kept.begin(), row));
    const Tensor d_attended = d_rest[1].view({query.size(0), query.size(1), value.size(2)});
    const Tensors d_row = blocks->backward(d_attended, query, key, value, Tensors(chances, kept.end()));
    Tensors all = heads->backward_and(d_row[0], d_row[1], d_row[2], Tensors(row + 3, chances), below, d_rest[0]);
    all.insert(all.end(), d_rest.begin() + 2, d_rest.end());
    return all;
  }

 private:
  static constexpr int64_t OF_REST = 9, OF_HEADS = 9;  // tensors that each half keeps, its heads counted
};

// ---- loss

// Turn logits (targets, vocabulary) into the gradient of their weighted cross-entropy, in place; returns its sum.
// The last token of an example is a target only: no embedding has been asked for it, so its place is looked at here.
Tensor cross_entropy_gradient(const Tensor& logits, const Tensor& targets, const Tensor& weights) {
  const int64_t rows = logits.size(0), width = logits.size(1);
  TORCH_CHECK(logits.is_contiguous() && targets.numel() == rows && weights.numel() == rows, "a target for each row");
  TORCH_CHECK(targets.scalar_type() == at::kLong && weights.scalar_type() == at::kFloat, "int64 targets, float32 weights");
  Tensor losses = at::empty({rows}, weights.options());
  Tensor own_targets = targets.contiguous(), own_weights = weights.contiguous();
  const int64_t* picked = start<int64_t>(own_targets);
  for (int64_t row = 0; row < rows; ++row)
    TORCH_CHECK(picked[row] >= 0 && picked[row] < width, "target ", picked[row], " is out of bounds for ", width, " logits");
  const float* counts = start<float>(own_weights);
  float* lost = start<float>(losses);
  by_type(logits, [&](auto kind) {
    using T = decltype(kind);
    T* states = start<T>(logits);
    at::parallel_for(0, rows, 1, [&](int64_t from, int64_t to) {
      std::vector<float> powers(width);
      for (int64_t row = from; row < to; ++row) {
        T* own = states + row * width;
        float* e = powers.data();
        float most = -std::numeric_limits<float>::infinity(), sum = 0;
#pragma omp simd reduction(max : most)
        for (int64_t i = 0; i < width; ++i) most = std::max(most, wide(own[i]));
#pragma omp simd reduction(+ : sum)
        for (int64_t i = 0; i < width; ++i) sum += e[i] = power(wide(own[i]) - most);
        const float count = counts[row], by = 1.0f / sum;
        const int64_t target = picked[row];
        lost[row] = (std::log(sum) + most - wide(own[target])) * count;
#pragma omp simd
        for (int64_t i = 0; i < width; ++i) own[i] = narrow<T>(e[i] * by * count);
        own[target] = narrow<T>((e[target] * by - 1.0f) * count);
      }
    });
  });
  return losses.sum();
}

// ---- the gradient's length

// The length of all gradients as one vector; scaled down in place to `limit` where they are longer, as
// torch.nn.utils.clip_grad_norm_ does. Sums are of pieces of a fixed size, so that threads do not change them.
double clip(const Tensors& gradients, double limit) {
  struct Piece { float* from; int64_t size; };
  std::vector<Piece> pieces;
  for (const Tensor& each : gradients) {
    TORCH_CHECK(each.scalar_type() == at::kFloat && each.is_contiguous(), "contiguous float32 gradients");
    for (int64_t at = 0; at < each.numel(); at += GRAIN)
      pieces.push_back({start<float>(each) + at, std::min(GRAIN, each.numel() - at)});
  }
  const int64_t num = static_cast<int64_t>(pieces.size());
  std::vector<double> squares(num);
  at::parallel_for(0, num, 4, [&](int64_t from, int64_t to) {
    for (int64_t each = from; each < to; ++each) {
      const auto [numbers, size] = pieces[each];
      float sum = 0;
#pragma omp simd reduction(+ : sum)
      for (int64_t i = 0; i < size; ++i) sum += numbers[i] * numbers[i];
      squares[each] = sum;
    }
  });
  double total = 0;
  for (double each : squares) total += each;
  const double length = std::sqrt(total), factor = limit / (length + 1e-6);
  if (factor < 1) {
    at::parallel_for(0, num, 4, [&](int64_t from, int64_t to) {
      for (int64_t each = from; each < to; ++each) {
        const auto [numbers, size] = pieces[each];
#pragma omp simd
        for (int64_t i = 0; i < size; ++i) numbers[i] *= static_cast<float>(factor);
      }
    });
  }
  return length;
}

}  // namespace

TORCH_LIBRARY(retune, library) {
  library.def("use_arena", [] { return arena::use(); });
  library.def("clip", &clip);
  library.def("cross_entropy_gradient", &cross_entropy_gradient);
  library.class_<Linears>("Linears").def(torch::init<Tensor, Tensor, Tensor, Lengths, Lengths, double>());
  library.class_<Heads>("Heads")
      .def(torch::init<Layers, Tensor, double>())
      .def("forward", &Heads::forward)
      .def("backward", &Heads::backward);
  library.class_<Blocks>("Blocks")
      .def(torch::init<Tensors, Tensors, Tensors, Tensors, Tensor, Tensor, int64_t, double>())
      .def("forward", &Blocks::forward)
      .def("backward", &Blocks::backward);
  library.class_<Rest>("Rest")
      .def(torch::init<Layers, Layers, Layers, Tensor, double>())
      .def("forward", &Rest::forward)
      .def("backward", &Rest::backward);
  library.class_<Layer>("Layer")
      .def(torch::init<c10::intrusive_ptr<Heads>, c10::intrusive_ptr<Rest>>())
      .def("forward", &Layer::forward)
      .def("backward", &Layer::backward);
}
