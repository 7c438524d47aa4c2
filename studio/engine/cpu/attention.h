// Attention over one group of blocks (engine/blocks.py) by tiles: a piece of a block's scores lies in a core's cache from
// its products to its softmax and back, and nothing is gathered into a tensor of its own.

#pragma once

#include "numbers.h"
#include "tiles.h"

namespace attention {

using namespace numbers;
using tiles::Lines;

constexpr int64_t PIECE = 256;  // rows of scores at once, at most
constexpr int64_t TASKS = 16;   // sums of gradients that are made side by side, where there are so many

// Rows are those of a key head: each of its tokens' heads that share it, one after another. A batch is a block of a head.
struct Group {
  const int64_t *tokens, *keys;  // rows of states by (batch, token), by (batch, key)
  const float* bias;             // by (block, token, key)
  const bool* padding;           // by (block, token)
  int64_t heads, blocks, size, num_keys, shared, width, value_width;
  float scaling;

  int64_t batches() const { return heads * blocks; }
  int64_t rows() const { return size * shared; }
  int64_t pitch() const { return tiles::filled(num_keys); }  // from one row of scores to the next

  int64_t piece_rows() const {
    const int64_t pieces = (rows() + PIECE - 1) / PIECE;
    return tiles::filled((rows() + pieces - 1) / pieces);
  }
  int64_t pieces() const { return (rows() + piece_rows() - 1) / piece_rows(); }

  // Pieces of a batch in turns share a sum; so many sums are made side by side that threads have enough to share.
  int64_t sums() const { return std::min(pieces(), (TASKS + batches() - 1) / batches()); }
};

struct Piece {
  int64_t batch, from, count;  // rows `from` to `from + count` of a batch
};

// `run(piece, sum, whether it is the first of that)`, each sum in a thread of its own.
template <typename Run> void over_pieces(const Group& group, int64_t sums, Run run) {
  const int64_t pieces = group.pieces(), rows = group.piece_rows();
  at::parallel_for(0, group.batches() * sums, 1, [&](int64_t first, int64_t last) {
    const tiles::Done done;
    for (int64_t task = first; task < last; ++task) {
      const int64_t sum = task % sums, from = sum * pieces / sums, to = (sum + 1) * pieces / sums;
      for (int64_t at = from; at < to; ++at) {
        run(Piece{task / sums, at * rows, std::min(rows, group.rows() - at * rows)}, sum, at == from);
      }
    }
  });
}

// Where a piece's rows begin in states with `numbers` a row; none for padding, where that is hidden.
inline Lines rows_of(const Group& group, const Piece& piece, const Half* states, int64_t numbers, bool hides = false) {
  Lines out(tiles::filled(piece.count), nullptr);
  for (int64_t i = 0; i < piece.count; ++i) {
    const int64_t token = (piece.from + i) / group.shared, head = (piece.from + i) % group.shared;
    if (hides && group.padding[piece.batch % group.blocks * group.size + token]) continue;
    out[i] = states + (group.tokens[piece.batch * group.size + token] * group.shared + head) * numbers;
  }
  return out;
}

inline Lines keys_of(const Group& group, int64_t batch, const Half* states, int64_t numbers) {
  Lines out(group.pitch(), nullptr);
  for (int64_t key = 0; key < group.num_keys; ++key) {
    out[key] = states + group.keys[batch * group.num_keys + key] * numbers;
  }
  return out;
}

inline void gather(const Lines& lines, int64_t count, int64_t numbers, Half* out) {
  for (int64_t i = 0; i < count; ++i, out += numbers) {
    if (lines[i] != nullptr) std::memcpy(out, lines[i], numbers * sizeof(Half));
    else std::fill_n(out, numbers, Half{});
  }
}

// A piece's share of what its tokens see, rows `pitch` apart, zeros beyond the keys.
inline void chances(const Group& group, const Piece& piece, const Half* asks, const Half* offers, Half* out) {
  const int64_t pitch = group.pitch(), keys = group.num_keys;
  Half* asked = tiles::scratch<tiles::FIRST, Half>(piece.count * group.width);
  float* scores = tiles::scratch<tiles::SUMS, float>(piece.count * pitch);
  gather(rows_of(group, piece, asks, group.width), piece.count, group.width, asked);
  const Lines offered = keys_of(group, piece.batch, offers, group.width);
  tiles::by_lines(asked, piece.count, group.width, offered, false, pitch, scores);
  for (int64_t i = 0; i < piece.count; ++i) {
    const int64_t token = (piece.from + i) / group.shared;
    const float* hidden = group.bias + (piece.batch % group.blocks * group.size + token) * keys;
    softmax(scores + i * pitch, hidden, group.scaling, keys, pitch, out + i * pitch);
  }
}

// Into `out`: each row's result. `kept`: room for the shares, or nullptr.
inline void forward(const Group& group, const Half* asks, const Half* offers, const Half* holds, Half* kept, Half* out) {
  const int64_t pitch = group.pitch(), width = group.value_width;
  over_pieces(group, group.pieces(), [&](const Piece& piece, int64_t, bool) {
    const int64_t row = piece.batch * group.rows() + piece.from;
    Half* own = kept ? kept + row * pitch : tiles::scratch<tiles::SECOND, Half>(piece.count * pitch);
    chances(group, piece, asks, offers, own);
    float* sums = tiles::scratch<tiles::SUMS, float>(piece.count * width);
    tiles::by_lines(own, piece.count, pitch, keys_of(group, piece.batch, holds, width), true, width, sums);
    tiles::put(out + row * width, width, 1, sums, piece.count, width, width, 1.0f);
  });
}

// Into `d_asks` the gradient at each row, into `d_offers` and `d_holds` (sums, batch, key) those at what it sees.
inline void backward(
    const Group& group, const Half* gradient, const Half* asks, const Half* offers, const Half* holds, const Half* kept,
    Half* d_asks, float* d_offers, float* d_holds) {
  const int64_t pitch = group.pitch(), width = group.width, value_width = group.value_width, keys = group.num_keys;
  over_pieces(group, group.sums(), [&](const Piece& piece, int64_t sum_of, bool is_first) {
    const int64_t row = piece.batch * group.rows() + piece.from, count = piece.count, filled = tiles::filled(count);
    const Half* own = kept ? kept + row * pitch : nullptr;
    if (own == nullptr) {
      Half* again = tiles::scratch<tiles::SECOND, Half>(count * pitch);
      chances(group, piece, asks, offers, again);
      own = again;
    }
    Half* wanted = tiles::scratch<tiles::FIRST, Half>(count * value_width);
    Half* d_scores = tiles::scratch<tiles::THIRD, Half>(count * pitch);
    gather(rows_of(group, piece, gradient, value_width, true), count, value_width, wanted);
    float* sums = tiles::scratch<tiles::SUMS, float>(count * std::max(pitch, width));
    tiles::by_lines(wanted, count, value_width, keys_of(group, piece.batch, holds, value_width), false, pitch, sums);
    for (int64_t at = 0; at < count * pitch; at += pitch) {
      softmax_gradient(sums + at, own + at, group.scaling, pitch, d_scores + at);
    }
    const Lines offered = keys_of(group, piece.batch, offers, width), asked = rows_of(group, piece, asks, width);
    tiles::by_lines(d_scores, count, pitch, offered, true, width, sums);
    tiles::put(d_asks + row * width, width, 1, sums, count, width, width, 1.0f);
    Half* turned = tiles::scratch<tiles::FOURTH, Half>(pitch * filled);
    const int64_t at = (sum_of * group.batches() + piece.batch) * keys;
    tiles::turn(tiles::lines(d_scores, pitch, count, filled), pitch, turned);
    tiles::by_lines(turned, keys, filled, asked, true, width, d_offers + at * width, !is_first);
    tiles::turn(tiles::lines(own, pitch, count, filled), pitch, turned);
    const Lines wants = tiles::lines(wanted, value_width, count, filled);
    tiles::by_lines(turned, keys, filled, wants, true, value_width, d_holds + at * value_width, !is_first);
  });
}

}  // namespace attention
