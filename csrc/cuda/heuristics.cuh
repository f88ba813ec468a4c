// Every choice of size, each a function or a constant with its reason.
#pragma once

#include <algorithm>

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

// Elements of a row that a warp takes: two 16-byte loads of float32 a lane, both in flight at once.
// One layer alone (two matrices of 48 x 4096) then still makes 192 blocks, more than a card has
// multiprocessors, and rows of a few hundred numbers leave few lanes idle.
constexpr int kPiece = 256;

__host__ __device__ __forceinline__ constexpr int pieces_of(int width) {
  return (width + kPiece - 1) / kPiece;
}

// Bytes of a row of dBp that a thread of pack_backward takes at a time, and as much of B: a block
// has 4096 numbers of float32 in flight, a row of many models. A row is one block's, so that dd
// needs no second kernel to add up what several have found.
constexpr int kDotBytes = 64;

// Blocks of pack_backward that must fit on a multiprocessor: 80 registers a thread, since with 64
// the numbers in flight are spilled in float64.
constexpr int kGradBlocks = 3;

// Tokens that decode takes.
constexpr int kDecodeTokens = 16;

// Threads of a decode block: few, since there is little work and many multiprocessors to spread it
// over.
constexpr int kDecodeThreads = 128;

// Blocks of them that must fit on a multiprocessor: 128 registers a thread. Left to itself ptxas
// aims at more blocks and spills for it.
constexpr int kDecodeBlocks = 4;

// Rows of Ap that a warp of the shrink multiplies with each token it has read: two halve the reads
// of x, and more would leave too few warps (24 for Rp = 48 and each part of K).
constexpr int kShrinkRows = 2;

// Neighbours of y that a thread of the expand computes: in half precision a warp then reads 128
// bytes of a row of Bp, a whole line, and more would leave fewer blocks than multiprocessors.
constexpr int kExpandStep = 2;

// Rows of Bp that it has in flight; a padded rank is a multiple of it.
constexpr int kExpandRows = 16;

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

// Elements of a byte of dropout's mask: those of one Philox block, 16 bytes in half precision.
constexpr int kDropoutElements = 8;

// Such bytes that a thread handles: four 16-byte loads in half precision, and a word of the mask.
constexpr int kDropoutBytes = 4;

// The most ranks of a skinny product: q, k and v of an 8B model at r = 8 side by side. Of more, a
// warp's sums would not fit in registers.
constexpr int kSkinnyRanks = 160;

// The most ranks for which both products of the backward come from one read of the gradient: with
// more, the slice of Bp does not fit in shared memory beside the ring.
constexpr int kBothRanks = 96;

// Threads of a skinny product's block.
constexpr int kSkinnyThreads = 256;

// Blocks that fill a card: about one for each of an H100's 132 multiprocessors. More would hide
// latency better, but each adds a float32 sum of its own to write and to read again.
constexpr int kSkinnyBlocks = 132;

// Tokens and features of a tile of `down`: 16 tokens a warp, and a line of memory of each.
constexpr int kDownTokens = 128, kDownFeatures = 64;

// Of a tile of `grad`: 16 features a warp. Where it computes `down` as well, 32 a warp, so that
// half as many sums of `down` are written, and fewer tokens for the ring to fit.
constexpr int kGradTokens = 64, kGradFeatures = 128;
constexpr int kBothTokens = 32, kBothFeatures = 256;

// Stages of the ring: what fits in the 99 KB that a block may have on sm_120.
constexpr int kRing = 3, kRingOfManyRanks = 2;

// Parts into which `down` cuts the features, so that its blocks fill a card; each a multiple of a
// tile, and at least four of them, since the ring takes a few to fill.
inline int down_part(int tokens, int features) {
  const int tiles = (tokens + kDownTokens - 1) / kDownTokens;
  const int parts = std::max(1, std::min(kSkinnyBlocks / tiles, features / (4 * kDownFeatures)));
  const int part = (features + parts - 1) / parts;
  return (part + kDownFeatures - 1) / kDownFeatures * kDownFeatures;
}

// Tokens that a block of `grad` takes, likewise: at most 16 groups of them, whose sums are added up
// one after the other.
inline int grad_group(int tokens, int features, int tile_tokens, int tile_features) {
  const int slices = (features + tile_features - 1) / tile_features;
  const int most = std::min(16, tokens / (4 * tile_tokens));
  const int groups = std::max(1, std::min(kSkinnyBlocks / slices, most));
  const int group = (tokens + groups - 1) / groups;
  return (group + tile_tokens - 1) / tile_tokens * tile_tokens;
}

}  // namespace rasa_ext
