#include "cells.hpp"

#include <algorithm>
#include <cstring>
#include <stdexcept>

namespace {

// Bytes of `elements` of `bits` in whole words; those of 6 bits are a plane of 4 and one of 2.
size_t plane_bytes(int64_t elements, int bits) {
  if (bits == 6) return plane_bytes(elements, 4) + plane_bytes(elements, 2);
  return size_t((elements * bits + 31) / 32 * 4);
}

constexpr int64_t MOST_SCALES = 1 << 12;

}  // namespace

Cells::Cells(const std::string& format, int64_t rank, int64_t rope) : rank_(rank), rope_(rope), group_(rank) {
  if (format == "float32" || format == "float16") {
    format_ = format == "float32" ? FLOAT32 : FLOAT16;
    bytes_ = size_t(rank + rope) * (format_ == FLOAT32 ? 4 : 2);
    return;
  }
  if (rank % 32 || rope % 8) throw std::runtime_error("latentrt: a packed cache takes ranks of 32, 64 and so on, rope dims of 8");
  if (format == "fp8") {
    format_ = FP8;
    latent_bytes_ = size_t(rank), rope_bytes_ = size_t(rope) * 2;
    bytes_ = latent_bytes_ + size_t((rank + FP8_GROUP - 1) / FP8_GROUP) * 4 + rope_bytes_;
    return;
  }
  format_ = INTEGERS;
  latent_bits_ = format == "int4" ? 4 : 6, rope_bits_ = format == "int6r" ? 6 : 8;
  if (format != "int4" && format != "int6" && format != "int6r") throw std::runtime_error("latentrt: unknown cache format " + format);
  if (format == "int4") group_ = rank % 64 ? 32 : 64;
  latent_bytes_ = plane_bytes(rank, latent_bits_), rope_bytes_ = plane_bytes(rope, rope_bits_);
  bytes_ = latent_bytes_ + rope_bytes_ + plane_bytes(rank / group_ + 1, 16);
  if (rank / group_ >= MOST_SCALES) throw std::runtime_error("latentrt: kv_lora_rank is too large for a packed cache");
}

bool Cells::whole() const {
  return format_ == INTEGERS && rank_ <= MOST_RANK && rope_ <= MOST_ROPE && rank_ / group_ <= WHOLE_GROUPS;
}

WholeLayout Cells::layout() const {
  WholeLayout found;
  found.rank = int(rank_), found.rope = int(rope_), found.group = int(group_);
  found.latent_coding = latent_bits_ == 6 ? INT6 : INT4, found.rope_coding = rope_bits_ == 6 ? INT6 : INT8;
  found.latent_high = plane_bytes(rank_, 4), found.rope_high = plane_bytes(rope_, 4);
  found.rope_low = latent_bytes_, found.scales = latent_bytes_ + rope_bytes_;
  return found;
}

void Cells::read(const Kernels& kernels, const uint8_t* cell, float* x) const {
  if (format_ == FLOAT32) {
    std::memcpy(x, cell, bytes_);
  } else if (format_ == FLOAT16) {
    kernels.widen(reinterpret_cast<const uint16_t*>(cell), int(rank_ + rope_), x);
  } else if (format_ == FP8) {
    for (int64_t e = 0; e < rank_; e += FP8_GROUP) {
      float scale;
      std::memcpy(&scale, cell + latent_bytes_ + e / FP8_GROUP * 4, 4);
      kernels.unpack(E4M3, cell + e, nullptr, int(std::min(FP8_GROUP, rank_ - e)), scale, x + e);
    }
    kernels.unpack(BF16, cell + bytes_ - rope_bytes_, nullptr, int(rope_), 1.0f, x + rank_);
  } else {
    uint16_t halves[MOST_SCALES];
    float scales[MOST_SCALES];
    const int64_t groups = rank_ / group_;
    std::memcpy(halves, cell + latent_bytes_ + rope_bytes_, size_t(groups + 1) * 2);
    kernels.widen(halves, int(groups + 1), scales);
    const auto part = [&](const uint8_t* low, int bits, int64_t elements, int64_t from, int64_t count, float scale, float* to) {
      const uint8_t* high = low + plane_bytes(elements, 4);
      kernels.unpack(bits == 4 ? INT4 : bits == 6 ? INT6 : INT8, low + from * (bits == 8 ? 8 : 4) / 8, high + from / 4, int(count),
                     scale, to);
    };
    for (int64_t g = 0; g < groups; ++g) part(cell, latent_bits_, rank_, g * group_, group_, scales[g], x + g * group_);
    part(cell + latent_bytes_, rope_bits_, rope_, 0, rope_, scales[groups], x + rank_);
  }
}

void Cells::write(const Kernels& kernels, const float* x, uint8_t* cell) const {
  if (format_ == FLOAT32) {
    std::memcpy(cell, x, bytes_);
  } else if (format_ == FLOAT16) {
    kernels.narrow(x, int(rank_ + rope_), reinterpret_cast<uint16_t*>(cell));
  } else if (format_ == FP8) {
    for (int64_t e = 0; e < rank_; e += FP8_GROUP) {
      const float scale = kernels.pack_e4m3(x + e, int(std::min(FP8_GROUP, rank_ - e)), cell + e);
      std::memcpy(cell + latent_bytes_ + e / FP8_GROUP * 4, &scale, 4);
    }
    kernels.pack_bf16(x + rank_, int(rope_), reinterpret_cast<uint16_t*>(cell + bytes_ - rope_bytes_));
  } else {
    uint16_t scales[MOST_SCALES];
    const int64_t groups = rank_ / group_;
    std::memset(cell, 0, bytes_);
    const auto part = [&](const float* from_x, uint8_t* low, int bits, int64_t elements, int64_t from, int64_t count) {
      uint8_t* high = low + plane_bytes(elements, 4);
      return kernels.pack(from_x, int(count), bits, low + from * (bits == 8 ? 8 : 4) / 8, high + from / 4);
    };
    for (int64_t g = 0; g < groups; ++g) scales[g] = part(x + g * group_, cell, latent_bits_, rank_, g * group_, group_);
    scales[groups] = part(x + rank_, cell + latent_bytes_, rope_bits_, rope_, 0, rope_);
    std::memcpy(cell + latent_bytes_ + rope_bytes_, scales, size_t(groups + 1) * 2);
  }
}
