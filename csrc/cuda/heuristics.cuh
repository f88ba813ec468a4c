// Every choice of size, each a function or a constant with its reason.
#pragma once

#include "numbers.cuh"

namespace rasa_ext {

// Threads of a block that streams memory: eight warps keep enough loads in flight, and several
// blocks still fit on a multiprocessor.
constexpr int kStreamThreads = 256;

// Threads of the block that writes a table: four words each at most, read one after the other.
constexpr int kTableThreads = 128;

// Blocks of them that must fit on a multiprocessor: 64 registers a thread. Left to itself ptxas
// aims at more blocks on some architectures (40 registers, or 32) and spills one register or two
// for it.
constexpr int kStreamBlocks = 4;

// Elements that one block copies: two 16-byte stores a thread in half precision. One layer alone
// (48 x 4096) then still has 48 blocks, and a block's fixed cost is small against its 4096
// elements.
constexpr int kCopyElements = 4096;

// How many blocks fill a card: the largest has about 150 multiprocessors, and each holds 8 blocks
// of kStreamThreads.
constexpr int64_t kFullCard = 1200;

// Elements of Bt that a block of a pack assembles in shared memory, a power of two. A lone layer is
// cut small, for it is latency that it waits for; where the card is full anyway larger tiles are
// cheaper, since each thread divides a few times a tile to find its place. 16 KB, so that shared
// memory does not keep blocks from a multiprocessor.
inline int tile_elements(int64_t elements, int element_size) {
  int tile = 1024;
  while (tile * 2 * element_size <= 16 * 1024 && tile * 2 * kFullCard <= elements) tile *= 2;
  return tile;
}

// pack_backward's tile of (out, R): rows of T are read along `out`, 512 bytes at a time; 32 columns
// are a warp's width, and in float64 the tile still fits the 48 KB that need no opt-in.
constexpr int kGradRows = 128;
constexpr int kGradCols = 32;

inline int grad_tiles(int out) { return (out + kGradRows - 1) / kGradRows; }

// Elements that a thread of the pool's sum holds: one 16-byte load of float32 a layer.
constexpr int kSumElements = 4;

// Tokens that decode takes.
constexpr int kDecodeTokens = 16;

// Threads of a decode block: few, since there is little work and many multiprocessors to spread it
// over.
constexpr int kDecodeThreads = 128;

// Rows of Ap that a warp of the shrink multiplies with each token it has read: two halve the reads
// of x, and more would leave too few warps (24 for Rp = 48 and each part of K).
constexpr int kShrinkRows = 2;

// Lanes that share a row of Bt in the expand: with Rp = 48 in half precision a row is six 16-byte
// loads, and 4 lanes make four times the warps that one lane a row would.
constexpr int kExpandLanes = 4;

// Shared memory that needs no opt-in.
constexpr int kSharedBytes = 48 * 1024;

// Tokens that one thread of decode sums at a time, so many accumulators it holds: all, as long as
// registers allow it (8), else the packs are read again for the next ones, from cache. 0: none fit,
// since the expand keeps these tokens' U (tokens, Rp) in shared memory.
inline int token_tile(int M, int Rp) {
  const int64_t fit = Rp > 0 ? kSharedBytes / (int64_t{4} * Rp) : 8;
  const int wanted = M > 4 ? 8 : M > 1 ? 4 : 1;
  if (wanted <= fit) return wanted;
  return fit >= 4 ? 4 : fit >= 1 ? 1 : 0;
}

// Parts into which decode cuts K = in: a warp's part should be at least 512 elements (two 16-byte
// loads a lane in half precision); more than 16 parts would make the expand's blocks, each of which
// adds them all up again, wait longer than is won.
inline int decode_splits(int in) {
  const int parts = in / 512;
  return parts < 1 ? 1 : parts > 16 ? 16 : parts;
}

// Elements of such a part: a multiple of 8, so that every part begins at 16 bytes if the first
// does.
inline int decode_part(int in) {
  const int splits = decode_splits(in), part = (in + splits - 1) / splits;
  return (part + 7) / 8 * 8;
}

// Elements that a thread of dropout handles: one Philox block, one byte of the mask, 16 bytes in
// half precision.
constexpr int kDropoutElements = 8;

}  // namespace rasa_ext
