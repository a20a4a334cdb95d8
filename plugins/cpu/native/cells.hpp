// How a token lies in a cell of the cache: what plugins/cache_formats has under the same name.
#pragma once
#include <string>

#include "kernels.hpp"

class Cells {
 public:
  // Of a format for tokens of `rank` + `rope` elements. Throws for a name that is not known here.
  Cells(const std::string& format, int64_t rank, int64_t rope);

  size_t bytes() const { return bytes_; }
  // Whether a cell is the token itself, in float32.
  bool plain() const { return format_ == FLOAT32; }
  // Whether a cell is whole numbers times scales that attend_whole takes, and where they lie.
  bool whole() const;
  WholeLayout layout() const;
  // The token [rank + rope] as float32.
  void read(const Kernels& kernels, const uint8_t* cell, float* x) const;
  void write(const Kernels& kernels, const float* x, uint8_t* cell) const;

 private:
  enum Format { FLOAT32, FLOAT16, FP8, INTEGERS };
  // Sums of products of 16 bits must stay within 32: those of so many 6-bit numbers do, and of k_pe's 8-bit ones.
  static constexpr int64_t MOST_RANK = 2047, MOST_ROPE = 511;
  static constexpr int64_t FP8_GROUP = 128;

  Format format_;
  int64_t rank_, rope_, group_;  // group: elements of the latent that share a scale
  int latent_bits_ = 0, rope_bits_ = 0;
  size_t latent_bytes_, rope_bytes_, bytes_;
};
