// Products of bfloat16 numbers that are too small for a call of PyTorch's each: oneDNN's own kernel for a tile, on pieces
// that lie in a core's cache. Sums are float32. Where the processor has no such units, PyTorch's products count.

#pragma once

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/native/CPUBlas.h>

#include <algorithm>
#include <vector>

#include "numbers.h"

namespace tiles {

using at::Tensor;
using namespace numbers;
using Lines = std::vector<const Half*>;  // where each row of a matrix begins; nullptr: zeros

constexpr int64_t STEP = 32;      // numbers that a unit sums at once; sides of a product are filled up to it with zeros
constexpr int64_t ROWS = 64;      // of a tile of the result
constexpr int64_t COLUMNS = 64;   // of a tile
constexpr int64_t SUMMED = 1024;  // numbers that one call sums
constexpr int64_t AHEAD = 16;     // lines; memory is asked for them before they are read
constexpr int64_t SIDE = 16;      // numbers of 32 bits in a vector

inline int64_t filled(int64_t size) { return (size + STEP - 1) / STEP * STEP; }

// Whether this processor has units for them.
inline bool fit(const Tensor& x) {
  static const bool has = at::native::cpublas::could_pack(at::kBFloat16);
  return has && x.scalar_type() == at::kBFloat16;
}

// Memory of a thread that is used again: one for each use.
enum Use { RIGHT, SUMS, FIRST, SECOND, THIRD, FOURTH };

template <Use use, typename T> T* scratch(int64_t size) {
  constexpr int64_t LINE = 64;  // bytes, of a cache
  static thread_local std::vector<T> own;
  const size_t needed = size + LINE / sizeof(T);
  if (own.size() < needed) own.resize(needed);
  return reinterpret_cast<T*>((reinterpret_cast<uintptr_t>(own.data()) + LINE - 1) / LINE * LINE);
}

// Rows of a matrix that are `apart` numbers from each other, filled up with zeros to a `count`.
inline Lines lines(const Half* at, int64_t apart, int64_t rows, int64_t count) {
  Lines out(count, nullptr);
  for (int64_t row = 0; row < rows; ++row) out[row] = at + row * apart;
  return out;
}

typedef uint32_t Vector __attribute__((vector_size(4 * SIDE)));

// Half of what transposes: numbers whose row lacks BIT and whose column has it change places with their like.
template <int BIT> inline void exchange(Vector* rows) {
  for (int i = 0; i < SIDE; ++i) {
    if (i & BIT) continue;
    const Vector low = rows[i], high = rows[i + BIT];
#ifdef __clang__
    for (int j = 0; j < SIDE; ++j) {
      rows[i][j] = j & BIT ? high[j ^ BIT] : low[j];
      rows[i + BIT][j] = j & BIT ? high[j] : low[j ^ BIT];
    }
#else  // GCC makes one instruction of this, and many of the other
    Vector first, second;
    for (int j = 0; j < SIDE; ++j) {
      first[j] = j & BIT ? SIDE + (j ^ BIT) : j;
      second[j] = j & BIT ? SIDE + j : j ^ BIT;
    }
    rows[i] = __builtin_shuffle(low, high, first);
    rows[i + BIT] = __builtin_shuffle(low, high, second);
#endif
  }
}

inline void transpose(Vector* rows) {
  exchange<1>(rows);
  exchange<2>(rows);
  exchange<4>(rows);
  exchange<8>(rows);
}

// Two lines' numbers in turns.
inline void pair(const Half* first, const Half* second, int64_t size, uint32_t* out) {
  if (first != nullptr && second != nullptr) {
#pragma omp simd
    for (int64_t i = 0; i < size; ++i) out[i] = first[i].bits | static_cast<uint32_t>(second[i].bits) << 16;
    return;
  }
  for (int64_t i = 0; i < size; ++i) {
    out[i] = (first ? first[i].bits : 0u) | static_cast<uint32_t>(second ? second[i].bits : 0u) << 16;
  }
}

inline const Half* from_number(const Half* line, int64_t at) { return line == nullptr ? nullptr : line + at; }

// Numbers `from` to `from + real` of all lines, as the right side of a product that sums over the lines: pairs of lines
// (lines / 2, width, 2). Their count is even.
inline void pack_across(const Lines& lines, int64_t from, int64_t real, int64_t width, Half* out) {
  for (size_t line = 0; line < lines.size(); line += 2, out += 2 * width) {
    uint32_t* pairs = reinterpret_cast<uint32_t*>(out);
    if (line + AHEAD < lines.size()) {
      for (size_t next : {line + AHEAD, line + AHEAD + 1}) {
        if (lines[next] == nullptr) continue;
        for (int64_t at = from; at < from + real; at += STEP) __builtin_prefetch(lines[next] + at);
      }
    }
    pair(from_number(lines[line], from), from_number(lines[line + 1], from), real, pairs);
    std::fill(pairs + real, pairs + width, 0u);
  }
}

// Lines `from` to `from + width` as the right side of a product that sums along each: (size / 2, width, 2), where lines
// have `size` numbers, a multiple of STEP.
inline void pack_along(const Lines& lines, int64_t from, int64_t size, int64_t width, Half* out) {
  uint32_t* pairs = reinterpret_cast<uint32_t*>(out);
  for (int64_t line = 0; line < width; line += SIDE) {
    for (int64_t at = 0; at < size; at += STEP) {
      Vector rows[SIDE];
      for (int64_t i = 0; i < SIDE; ++i) {
        const Half* own = lines[from + line + i];
        if (const size_t next = from + line + SIDE + i; next < lines.size() && lines[next] != nullptr) {
          __builtin_prefetch(lines[next] + at);
        }
        if (own != nullptr) std::memcpy(&rows[i], own + at, sizeof(Vector));
        else rows[i] = Vector{};
      }
      transpose(rows);
      for (int64_t i = 0; i < SIDE; ++i) std::memcpy(pairs + (at / 2 + i) * width + line, &rows[i], sizeof(Vector));
    }
  }
}

// Lines of `size` numbers turned into rows: (size, lines). Their count is a multiple of STEP.
inline void turn(const Lines& lines, int64_t size, Half* out) {
  const int64_t count = static_cast<int64_t>(lines.size());
  for (int64_t line = 0; line < count; line += STEP) {
    for (int64_t from = 0; from < size; from += SIDE) {
      const int64_t real = std::min(SIDE, size - from);
      Vector rows[SIDE];
      for (int64_t i = 0; i < SIDE; ++i) {
        uint32_t pairs[SIDE] = {};
        pair(from_number(lines[line + 2 * i], from), from_number(lines[line + 2 * i + 1], from), real, pairs);
        std::memcpy(&rows[i], pairs, sizeof(Vector));
      }
      transpose(rows);
      for (int64_t i = 0; i < real; ++i) std::memcpy(out + (from + i) * count + line, &rows[i], sizeof(Vector));
    }
  }
}

// sums (rows, width) = left (rows, size) · right, which is packed and `width` columns wide; or that added to them.
inline void multiply(
    const Half* left, int64_t left_apart, int64_t rows, int64_t size, const Half* right, int64_t width, float* sums,
    int64_t sums_apart, bool adds = false) {
  const auto *own = reinterpret_cast<const at::BFloat16*>(left), *packed = reinterpret_cast<const at::BFloat16*>(right);
  for (int64_t row = 0; row < rows; row += ROWS) {
    for (int64_t at = 0; at < size; at += SUMMED) {
      at::native::cpublas::brgemm(
          std::min(ROWS, rows - row), width, std::min(SUMMED, size - at), left_apart, width, sums_apart, adds || at > 0,
          own + row * left_apart + at, packed + at * width, sums + row * sums_apart);
    }
  }
}

struct Done {  // a thread's units are given back
  ~Done() { at::native::cpublas::brgemm_release(); }
};

// Into numbers that are `down` and `right` apart: factor · sums, whose rows are `apart`.
template <typename T>
void put(T* to, int64_t down, int64_t right, const float* sums, int64_t rows, int64_t columns, int64_t apart, float factor) {
  if (right == 1) {
    for (int64_t row = 0; row < rows; ++row, to += down, sums += apart) {
#pragma omp simd
      for (int64_t i = 0; i < columns; ++i) to[i] = narrow<T>(factor * sums[i]);
    }
    return;
  }
  for (int64_t column = 0; column < columns; ++column) {
    for (int64_t row = 0; row < rows; ++row) {
      to[row * down + column * right] = narrow<T>(factor * sums[row * apart + column]);
    }
  }
}

// sums (rows, columns) = left (rows, size) · the matrix of these lines, which are its rows (`across`) or its columns.
// Where they are its rows there are `size` of them. Sides are multiples of STEP, but for the rows of `left`.
inline void by_lines(
    const Half* left, int64_t rows, int64_t size, const Lines& lines, bool across, int64_t columns, float* sums,
    bool adds = false) {
  Half* right = scratch<RIGHT, Half>(size * COLUMNS);
  for (int64_t column = 0; column < columns; column += COLUMNS) {
    const int64_t width = std::min(COLUMNS, columns - column);
    if (across) pack_across(lines, column, width, width, right);
    else pack_along(lines, column, size, width, right);
    multiply(left, size, rows, size, right, width, sums + column, columns, adds);
  }
}

// x as the left side of a product: rows one after another, what is summed filled up.
inline Tensor left_side(const Tensor& x) {
  if (x.stride(1) == 1 && x.size(1) % STEP == 0) return x;
  Tensor out = at::empty({x.size(0), filled(x.size(1))}, x.options());
  if (x.stride(1) == 1) {
    out.zero_();
    out.slice(1, 0, x.size(1)).copy_(x);
  } else {
    turn(lines(start<Half>(x), x.stride(1), x.size(1), filled(x.size(1))), x.size(0), start<Half>(out));
  }
  return out;
}

// total = factor · x @ y. x, y: numbers of one kind, those of a row of y without gaps; total: that, or float32.
// Rows and columns are shared among threads, which does not change the sums.
inline void product(const Tensor& total, const Tensor& x, const Tensor& y, float factor = 1) {
  if (!fit(x)) {
    if (total.scalar_type() == x.scalar_type()) at::addmm_out(const_cast<Tensor&>(total), total, x, y, 0, factor);
    else total.copy_(at::mm(x, y)).mul_(factor);
    return;
  }
  const Tensor left = left_side(x);
  TORCH_CHECK(y.stride(1) == 1, "rows without gaps");
  const int64_t rows = x.size(0), columns = y.size(1), size = left.size(1), apart = left.stride(0);
  const int64_t down = total.stride(0), right = total.stride(1);
  const Lines own = lines(start<Half>(y), y.stride(0), y.size(0), size);
  const int64_t strips = filled(columns) / STEP, pieces = (rows + ROWS - 1) / ROWS;
  const int64_t parts = std::min(pieces, std::max<int64_t>(1, 2 * at::get_num_threads() / strips));
  by_type(total, [&](auto kind) {
    using T = decltype(kind);
    T* to = start<T>(total);
    const Half* from = start<Half>(left);
    at::parallel_for(0, parts * strips, 1, [&](int64_t first, int64_t last) {
      const Done done;
      Half* packed = scratch<RIGHT, Half>(size * COLUMNS);
      float* sums = scratch<SUMS, float>(ROWS * COLUMNS);
      for (int64_t task = first; task < last;) {
        const int64_t part = task / strips, end = std::min(last, (part + 1) * strips);
        const int64_t column = task % strips * STEP, width = std::min(COLUMNS, (end - task) * STEP);
        const int64_t real = std::min(width, columns - column);
        pack_across(own, column, real, width, packed);
        for (int64_t piece = part * pieces / parts; piece < (part + 1) * pieces / parts; ++piece) {
          const int64_t row = piece * ROWS, count = std::min(ROWS, rows - row);
          multiply(from + row * apart, apart, count, size, packed, width, sums, width);
          put(to + row * down + column * right, down, right, sums, count, real, width, factor);
        }
        task += width / STEP;
      }
    });
  });
}

}  // namespace tiles
