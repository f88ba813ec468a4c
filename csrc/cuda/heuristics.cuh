// Sizes that the kernels use: one constant or function for each, with the reason.
#pragma once

#include <algorithm>
#include <cstdlib>

#include "numbers.cuh"

namespace rasa_ext {

// Threads of a block that streams memory. Eight warps keep enough loads in flight, and several
// blocks still fit on a multiprocessor.
constexpr int kStreamThreads = 256;

// Threads of the block that writes a table. Each writes at most four words, one after the other.
constexpr int kTableThreads = 128;

// Streaming blocks that must fit on a multiprocessor: this allows 64 registers per thread. Without
// this limit, ptxas aims at more blocks on some architectures (40 registers, or 32) and spills one
// or two registers.
constexpr int kStreamBlocks = 4;

// Elements of a row that a warp takes: two 16-byte loads of float32 per lane, both in flight at
// once. A single layer (two matrices of 48 x 4096) then still makes 192 blocks, more than a card
// has multiprocessors, and rows of a few hundred elements leave few lanes idle.
constexpr int kPiece = 256;

__host__ __device__ __forceinline__ constexpr int pieces_of(int width) {
  return (width + kPiece - 1) / kPiece;
}

// Ranks of a tile of B, in which ranks are columns: eight float32 are a sector of 32 bytes, the
// least that memory gives. A warp takes each rank.
constexpr int kRanks = kStreamThreads / 32;

// Ranks of a block of pack_backward that computes dd. It takes whole rows of dBp, so that dd needs
// no second kernel to add up partial sums. Eight ranks would leave the fewest sectors of B half
// used, but a single layer of 39 ranks only 5 blocks.
constexpr int kDotRanks = 4;

// Bytes of a row of dBp that a thread of such a block takes at a time, with the matching elements
// of B: a block has 4096 float32 elements of each in flight.
constexpr int kDotBytes = 64;

// Blocks of pack_backward that must fit on a multiprocessor: this allows 128 registers per thread.
// With 80, elements in flight are spilled. Two blocks have 64 KB in flight, more than latency
// needs.
constexpr int kGradBlocks = 2;

// Most tokens that decode takes.
constexpr int kDecodeTokens = 16;

// Threads of a decode block: few, so that little work spreads over many multiprocessors.
constexpr int kDecodeThreads = 128;

// Decode blocks that must fit on a multiprocessor: this allows 128 registers per thread. Without
// this limit, ptxas aims at more blocks and spills.
constexpr int kDecodeBlocks = 4;

// Rows of Ap that a warp of the shrink kernel multiplies with each token that it reads. Two halve
// the reads of x. More would leave too few warps: two leave 24 for Rp = 48 and each part of K.
constexpr int kShrinkRows = 2;

// Neighbouring columns of y that a thread of the expand kernel computes. In half precision a warp
// then reads 128 bytes of a row of Bp, a whole cache line. More columns would leave fewer blocks
// than multiprocessors.
constexpr int kExpandStep = 2;

// Rows of Bp that a thread of the expand kernel has in flight. A padded rank is a multiple of this.
constexpr int kExpandRows = 16;

// Bytes of shared memory that a block may use without an opt-in.
constexpr int kSharedBytes = 48 * 1024;

// Returns how many tokens one thread of decode sums at a time: all, as long as their accumulators
// fit in registers (8 tokens). Otherwise the packs are read again, from cache, for the next tokens.
// Returns 0 if no token fits: the expand kernel holds U (tokens, Rp) of these tokens in shared
// memory.
inline int token_tile(int M, int Rp) {
  const int64_t fit = Rp > 0 ? kSharedBytes / (int64_t{4} * Rp) : 8;
  const int wanted = M > 4 ? 8 : M > 1 ? 4 : 1;
  if (wanted <= fit) return wanted;
  return fit >= 4 ? 4 : fit >= 1 ? 1 : 0;
}

// Returns the number of parts into which decode splits K = in. A warp's part should have at least
// 512 elements (two 16-byte loads per lane in half precision). Every block of the expand kernel
// adds up all parts, so more than 16 would cost it more time than the split saves.
inline int decode_splits(int in) {
  const int parts = in / 512;
  return parts < 1 ? 1 : parts > 16 ? 16 : parts;
}

// Returns the elements of such a part: a multiple of 8, so that every part is 16-byte aligned if
// the first is.
inline int decode_part(int in) {
  const int splits = decode_splits(in), part = (in + splits - 1) / splits;
  return (part + 7) / 8 * 8;
}

// Elements of one byte of dropout's mask: one Philox block serves them; 16 bytes in half precision.
constexpr int kDropoutElements = 8;

// Mask bytes that a thread handles: four 16-byte loads in half precision, and one word of the mask.
constexpr int kDropoutBytes = 4;

// Most ranks of a skinny product: q, k and v of an 8B model at r = 8 side by side. With more, a
// warp's sums would not fit in registers.
constexpr int kSkinnyRanks = 160;

// Most ranks for which both products of the backward come from one read of the gradient. With more,
// the slice of Bp does not fit in shared memory beside the ring.
constexpr int kBothRanks = 96;

// Threads of a block of the skinny kernels.
constexpr int kSkinnyThreads = 256;

// Blocks that fill a card: about one for each of an H100's 132 multiprocessors. More would hide
// latency better, but each adds a float32 sum to write and read again. RASA_EXT_SKINNY_BLOCKS in
// the environment sets another number. It is read at every call, so that one run can compare.
inline int skinny_blocks() {
  const char* chosen = std::getenv("RASA_EXT_SKINNY_BLOCKS");
  const int blocks = chosen == nullptr ? 0 : std::atoi(chosen);
  return blocks > 0 ? blocks : 132;
}

// Tokens and features of a `down` tile: 16 tokens per warp, and one cache line of each token.
constexpr int kDownTokens = 128, kDownFeatures = 64;

// Tokens and features of a `grad` tile: 16 features per warp. If the kernel computes `down` as
// well, a warp takes 32 features, so that half as many sums of `down` are written, and the tile has
// fewer tokens, so that the ring fits.
constexpr int kGradTokens = 64, kGradFeatures = 128;
constexpr int kBothTokens = 32, kBothFeatures = 256;

// Stages of the ring: as many as fit in the 99 KB that a block may have on sm_120.
constexpr int kRing = 3, kRingOfManyRanks = 2;

// Returns the features that a block of `down` takes, few enough that the blocks fill a card: a
// multiple of a tile, and if possible at least four tiles, since the ring takes a few to fill.
inline int down_part(int tokens, int features) {
  const int tiles = (tokens + kDownTokens - 1) / kDownTokens;
  const int parts = std::max(1, std::min(skinny_blocks() / tiles, features / (4 * kDownFeatures)));
  const int part = (features + parts - 1) / parts;
  return (part + kDownFeatures - 1) / kDownFeatures * kDownFeatures;
}

// Returns the tokens that a block of `grad` takes, by the same rule, but in at most 16 groups,
// since their sums are added up one after the other.
inline int grad_group(int tokens, int features, int tile_tokens, int tile_features) {
  const int slices = (features + tile_features - 1) / tile_features;
  const int most = std::min(16, tokens / (4 * tile_tokens));
  const int groups = std::max(1, std::min(skinny_blocks() / slices, most));
  const int group = (tokens + groups - 1) / groups;
  return (group + tile_tokens - 1) / tile_tokens * tile_tokens;
}

}  // namespace rasa_ext
