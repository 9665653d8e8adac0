"""Wrong kernels that the tests must notice: each a replacement in one file of the package.

The text that a mutant replaces must occur exactly once in its file (checked by
`Mutant.applied`, and by a unit test for all), so that no mutant is left without effect after a
change of the kernels.

Equivalent mutants are left out: positions that are off by one for both queries and keys (rotary
embeddings are relative); the value of a score or weight that is multiplied by zero; and starts
and ends of pieces that move within a run of 16 tokens, since whole runs are read and tokens
that a query may not see are masked.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

Form = Literal[
    "best",
    "avx512-vnni",
    "avx512 and not vnni",
    "avx2-vnni",
    "avx2 and not vnni",
    "software-matrix",
    "neon-bf16",
    "neon and not neon-bf16",
]


@dataclass(frozen=True, slots=True)
class Mutant:
    """One wrong kernel.

    Attributes:
        name: what is wrong.
        file: in the package ``veneer_server/backends/native``.
        old: text that occurs there exactly once.
        form: the instruction set whose tests must notice, as named by their fixture.
    """

    name: str
    file: str
    old: str
    new: str
    form: Form = "best"

    def applied(self, text: str) -> str:
        """The file's text with the mutation.

        Raises:
            ValueError: `old` does not occur exactly once.
        """
        count = text.count(self.old)
        if count != 1:
            raise ValueError(
                f"mutant {self.name!r}: its text occurs {count} times in {self.file}: "
                "follow the change of the kernels in tests/mutants/native.py"
            )
        return text.replace(self.old, self.new)

    def apply(self, package: Path) -> None:
        """Apply the mutation to a copy of the package."""
        path = package / self.file
        path.write_text(self.applied(path.read_text("utf-8")), "utf-8")


_PACK: Final = "cpp/kernels/gemm/pack.h"
_QUANTIZE: Final = "cpp/kernels/gemm/quantize.h"
_LINEAR: Final = "cpp/kernels/gemm/linear.h"
_VECTORS: Final = "cpp/kernels/gemm/by_vectors.h"
_MATRIX: Final = "cpp/kernels/gemm/by_matrix.h"
_SQUARE: Final = "cpp/kernels/square.h"
_LORA: Final = "cpp/kernels/lora.h"
_CACHE: Final = "cpp/kernels/attention/cache.h"
_SCORES: Final = "cpp/kernels/attention/by_vectors.h"
_MATRIX_SCORES: Final = "cpp/kernels/attention/by_matrix.h"
_ATTENTION: Final = "cpp/kernels/attention/attention.h"
_HEADS: Final = "cpp/decoder/heads.h"
_ROWS: Final = "cpp/decoder/rows.h"
_STEP: Final = "cpp/decoder/decoder.h"
_SAMPLE: Final = "cpp/kernels/sample.h"
_SIMD: Final = "cpp/kernels/simd.h"
_BF16: Final = "cpp/kernels/bf16.h"
_AVX2: Final = "cpp/isa/avx2.h"
_AVX512: Final = "cpp/isa/avx512.h"
_NEON: Final = "cpp/isa/neon.h"
_REGISTERS: Final = "cpp/kernels/gemm/by_registers.h"
_PLAIN: Final = "neon and not neon-bf16"
_SOFTWARE: Final = "cpp/isa/software_matrix.h"
_FEW: Final = "cpp/kernels/gemm/by_numbers.h"
_FEW_QUERIES: Final = "cpp/kernels/attention/few_queries.h"
_X86: Final = "cpp/isa/x86.h"
_INT8: Final = "cpp/kernels/gemm/by_int8.h"
_INT8_ROWS: Final = "cpp/kernels/gemm/int8_rows.h"

MUTANTS: Final = (
    # ------------------------------------------------------------------- products
    Mutant(
        "4-bit codes of two neighbours exchanged",
        _PACK,
        "halves(four, 4) | halves(four, 0) << 16;",
        "halves(four, 0) | halves(four, 4) << 16;",
    ),
    Mutant(
        "4-bit scale of the next block",
        _PACK,
        "scales[output * size_t(blocks) + size_t(b)];",
        "scales[output * size_t(blocks) + size_t((b + 1) % blocks)];",
    ),
    Mutant(
        "4-bit scale of the neighbouring output",
        _PACK,
        "scales[output * size_t(blocks) + size_t(b)];",
        "scales[(output > 0 ? output - 1 : 1) * size_t(blocks) + size_t(b)];",
    ),
    Mutant(
        "outputs 16 to 31 of a tile scaled as 0 to 15",
        _VECTORS,
        "load(scales + 16) : low",
        "load(scales) : low",
    ),
    Mutant("8 bits rounded down", _PACK, "int8_t(std::lround(number))", "int8_t(number)"),
    Mutant("8-bit scale a 126th", _PACK, "scales[n] = most / 127;", "scales[n] = most / 126;"),
    Mutant(
        "a bound quantized as the number above it",
        _QUANTIZE,
        "!(bound >= numbers[k])",
        "!(bound > numbers[k])",
    ),
    Mutant(
        "NaN quantized as the lowest number",
        _QUANTIZE,
        "!(bound >= numbers[k])",
        "bound < numbers[k]",
    ),
    Mutant(
        "quantized by the largest number instead of the largest magnitude",
        _QUANTIZE,
        "bits & 0x7fffffff);",
        "bits);",
    ),
    Mutant(
        "subnormal blocks divided by their largest",
        _QUANTIZE,
        "magnitude < 1e-38f ? 1e-38f : magnitude",
        "magnitude > 0 ? magnitude : 1e-38f",
    ),
    Mutant(
        "subnormal float16 read as zero",
        _QUANTIZE,
        "result *= 0x1p112f;",
        "result = rest < 0x400u ? 0 : result * 0x1p112f;",
    ),
    Mutant("no bias", _LINEAR, "if (w.bias != nullptr) result", "if (false) result"),
    Mutant(
        "the last block of inputs left out",
        _VECTORS,
        "for (int b = 0; b < w.blocks(); ++b, block += bytes) {",
        "for (int b = 0; b + 1 < w.blocks(); ++b, block += bytes) {",
    ),
    Mutant(
        "gate and up exchanged",
        _LINEAR,
        "(within / 2 * parts + index / each) * 2",
        "(within / 2 * parts + (parts - 1 - index / each)) * 2",
    ),
    Mutant(
        "the second of two chains of sums left out",
        _VECTORS,
        "for (int c = 1; c < chains; ++c) {\n            first = add",
        "for (int c = 1; c < 1; ++c) {\n            first = add",
    ),
    Mutant(
        "of a row group, the first row's totals for all",
        _VECTORS,
        "float* total = totals + r * kTile;",
        "float* total = totals;",
    ),
    # -------------------------------------------------------------------- adapters
    Mutant(
        "LoRA scaling x 1.01",
        _LORA,
        "fma(sums[r][v], broadcast(member.scaling), load(to))",
        "fma(sums[r][v], broadcast(member.scaling * 1.01f), load(to))",
    ),
    Mutant(
        "LoRA scaling x 1.01, handed over by Python",
        "decoder.py",
        "place.scaling = scaling",
        "place.scaling = scaling * 1.01",
    ),
    Mutant(
        "the last rank left out",
        _LORA,
        "for (int rank = 0; rank < member.rank; ++rank, line += outputs) {",
        "for (int rank = 0; rank + 1 < member.rank; ++rank, line += outputs) {",
    ),
    Mutant("every projection reads q's part of h", _LORA, "rows.h += member.first;", ""),
    Mutant(
        "every row of a bunch reads the first one's h",
        _LORA,
        "const Floats input = broadcast(load_number(rows.h + r * rows.h_stride + rank));",
        "const Floats input = broadcast(load_number(rows.h + rank));",
    ),
    Mutant(
        "the last inputs of A left out",
        _LORA,
        "for (int k = 0; k < inputs; k += 2 * chains) {",
        "for (int k = 0; k < inputs - 2 * chains; k += 2 * chains) {",
    ),
    Mutant(
        "A read as if it did not lie in pairs",
        _LORA,
        ": pairs(load_pairs(a + k * size_t(ranks) + 2 * rank)) {}",
        ": pairs(load_pairs(a + k * size_t(ranks) + rank)) {}",
    ),
    Mutant(
        "ranks past 64 written over the first",
        _LORA,
        "    h += n;\n",
        "",
    ),
    Mutant(
        "v updated by k's matrices",
        _HEADS,
        "ctx_.updated(at, index, kQkv, 2, row_tile, value_at,",
        "ctx_.updated(at, index, kQkv, 1, row_tile, value_at,",
    ),
    Mutant(
        "up updated by gate's matrices",
        _ROWS,
        "ctx_.updated(at, layer, kGateUp, 1, row_tile, m_.intermediate + first,",
        "ctx_.updated(at, layer, kGateUp, 0, row_tile, m_.intermediate + first,",
    ),
    Mutant(
        "rows before a segment get its adapter",
        "cpp/decoder/context.h",
        "cut(step->segments[s].begin, nullptr);",
        "cut(step->segments[s].begin, step->segments[s].adapter);",
    ),
    # ------------------------------------------------------------------- attention
    Mutant(
        "attention scale x 1.003",
        _HEADS,
        "1.0f / std::sqrt(float(m_.dim))",
        "1.003f / std::sqrt(float(m_.dim))",
    ),
    Mutant(
        "half of a score",
        _SCORES,
        "mul(add(sums[0][q], sums[1][q]), broadcast(scale))",
        "mul(add(sums[0][q], sums[0][q]), broadcast(scale))",
    ),
    Mutant(
        "softmax without its maximum",
        _CACHE,
        "exp(sub(load(scores + t), top))",
        "exp(load(scores + t))",
    ),
    Mutant(
        "softmax sums what is not seen",
        _CACHE,
        "    std::fill(scores + seen, scores + count, none);\n",
        "",
    ),
    Mutant(
        "softmax sums what lies before the window",
        _CACHE,
        "    std::fill(scores, scores + unseen, none);\n",
        "",
    ),
    Mutant(
        "window larger by one",
        _HEADS,
        "std::max<int64_t>(0, end - layer.window)",
        "std::max<int64_t>(0, end - layer.window - 1)",
    ),
    Mutant(
        "window smaller by one",
        _HEADS,
        "std::max<int64_t>(0, end - layer.window)",
        "std::max<int64_t>(0, end - std::max<int64_t>(1, layer.window - 1))",
    ),
    Mutant("no window", "decoder.py", "config.windows[index] or 0", "0"),
    Mutant(
        "a token does not see itself",
        _HEADS,
        "const int64_t end = ctx_.step->positions[row] + 1;",
        "const int64_t end = std::max<int64_t>(1, ctx_.step->positions[row]);",
    ),
    Mutant(
        "K and V of the first head for all",
        _CACHE,
        "(blocks[number / runs] * shape.kv_heads + head)",
        "(blocks[number / runs] * shape.kv_heads + 0 * head)",
    ),
    Mutant(
        "K and V of the sequence's first block for all",
        _CACHE,
        "blocks[number / runs]",
        "blocks[0 * number]",
    ),
    Mutant(
        "V of a token's neighbour",
        _CACHE,
        "token / 2 * 2 * shape.dim + token % 2;",
        "token / 2 * 2 * shape.dim + 1 - token % 2;",
    ),
    Mutant(
        "the last run of a piece left out",
        _ATTENTION,
        "end = std::min(end, (number + 1) * kPiece);",
        "end = std::min(end, (number + 1) * kPiece - kRun);",
    ),
    Mutant(
        "pieces' sums without their shares",
        _ATTENTION,
        "total += shares[i] * piece.total();",
        "total += piece.total();",
    ),
    Mutant(
        "pieces' results without their shares",
        _ATTENTION,
        "broadcast(shares[i]), sum)",
        "broadcast(1.0f), sum)",
    ),
    Mutant(
        "queries past the first 12 see other keys",
        _HEADS,
        "items_.push_back({s, row, rows, head, head * group + first,",
        "items_.push_back({s, row, rows, head, head * group,",
    ),
    # ---------------------------------------------------------------------- rotary
    Mutant(
        "the sine's sign",
        _HEADS,
        "first * cosine[d] - second * sine[d]",
        "first * cosine[d] + second * sine[d]",
    ),
    Mutant(
        "queries turned by the row before's position",
        _HEADS,
        "normalize_and_rotate(query, layer.query_norm, row);",
        "normalize_and_rotate(query, layer.query_norm, row > 0 ? row - 1 : row);",
    ),
    Mutant(
        "keys turned by the row before's position",
        _HEADS,
        "normalize_and_rotate(query, layer.key_norm, row);",
        "normalize_and_rotate(query, layer.key_norm, row > 0 ? row - 1 : row);",
    ),
    Mutant(
        "rotary scale left out",
        "decoder.py",
        "rotary_scale=weights.rotary_scale",
        "rotary_scale=1",
    ),
    # ----------------------------------------------------------------------- norms
    Mutant(
        "norm without epsilon",
        _ROWS,
        "float(m_.hidden) + m_.epsilon)",
        "float(m_.hidden))",
    ),
    Mutant(
        "epsilon outside the root",
        _ROWS,
        "std::sqrt(sum(squares) / float(m_.hidden) + m_.epsilon)",
        "(std::sqrt(sum(squares) / float(m_.hidden)) + m_.epsilon)",
    ),
    Mutant(
        "query and key norms without epsilon",
        _HEADS,
        "float(m_.dim) + m_.epsilon)",
        "float(m_.dim))",
    ),
    Mutant(
        "queries by the keys' norm",
        _HEADS,
        "normalize_and_rotate(query, layer.query_norm, row);",
        "normalize_and_rotate(query, layer.key_norm, row);",
    ),
    Mutant(
        "the norm before the MLP is attention's",
        _STEP,
        "kOutput, m_.layers[layer].post_norm}",
        "kOutput, m_.layers[layer].input_norm}",
    ),
    Mutant(
        "the next layer's norm is this one's",
        _STEP,
        "m_.layers[layer + 1].input_norm",
        "m_.layers[layer].input_norm",
    ),
    Mutant(
        "the last norm of another row",
        _ROWS,
        "ctx_.step->logit_rows[i] * m_.hidden",
        "i * m_.hidden",
    ),
    # ---------------------------------------------------------------- gate, residual
    Mutant(
        "gate without silu",
        _ROWS,
        "mul(div(gate, divisor), load_shared(from + apart + i))",
        "mul(gate, load_shared(from + apart + i))",
    ),
    Mutant(
        "gate without up",
        _ROWS,
        "mul(div(gate, divisor), load_shared(from + apart + i))",
        "div(gate, divisor)",
    ),
    Mutant(
        "no residual",
        _ROWS,
        "veneer::add(load_shared(before + i), load_shared(from + i))",
        "load_shared(from + i)",
    ),
    Mutant(
        "a row's last numbers are not looked at",
        _ROWS,
        "if (i < count) none = fma",
        "if (false) none = fma",
    ),
    # ---------------------------------------------------------------------- numbers
    Mutant("e^x off by 1e-3", _SIMD, "broadcast(5.0000001201e-1f)", "broadcast(5.1e-1f)"),
    Mutant(
        "e^x ends at -20",
        _SIMD,
        "min(broadcast(88.0f), max(broadcast(-87.0f), x))",
        "min(broadcast(88.0f), max(broadcast(-20.0f), x))",
    ),
    Mutant(
        "bfloat16 rounded down",
        _BF16,
        "bf16((bits + 0x7fffu + ((bits >> 16) & 1)) >> 16)",
        "bf16(bits >> 16)",
    ),
    Mutant(
        "halves of a pair exchanged",
        _AVX2,
        "_mm256_fmadd_ps(odd(w.lo), odd(x.lo), lo)",
        "_mm256_fmadd_ps(odd(w.lo), even(x.lo), lo)",
        form="avx2 and not vnni",
    ),
    Mutant(
        "upper bytes of a code book's entries left out",
        _AVX2,
        "_mm256_slli_epi16(high, 8));",
        "_mm256_setzero_si256());",
        form="avx2 and not vnni",
    ),
    Mutant(
        "outputs 8 to 15 of a short row",
        _AVX2,
        "std::memcpy(padded, at, count * sizeof(bf16));",
        "std::memcpy(padded, at, (count < 8 ? count : 8) * sizeof(bf16));",
        form="avx2 and not vnni",
    ),
    # -------------------------------------------------------- floats instead of pairs
    Mutant(
        "a block decoded once: the halves of a tile exchanged",
        _FEW,
        "store(at[group][q][half][0], w.first);",
        "store(at[group][q][1 - half][0], w.first);",
        form="avx512 and not vnni",
    ),
    Mutant(
        "a block decoded once: the last group left out",
        _FEW,
        "for (int group = 0; group < 8; ++group) {\n            auto each",
        "for (int group = 0; group < 7; ++group) {\n            auto each",
        form="avx512 and not vnni",
    ),
    Mutant(
        "the last row of a panel's groups left out",
        _FEW,
        "end - begin, totals + begin * kTile);",
        "end - begin - 1, totals + begin * kTile);",
        form="avx512 and not vnni",
    ),
    Mutant(
        "the second of a panel's rows begins at the first one's outputs",
        _FEW,
        "float* to = y + start * y_stride;",
        "float* to = y;",
        form="avx512 and not vnni",
    ),
    Mutant(
        "second numbers multiplied by first inputs",
        _AVX512,
        "fma(seconds(w), seconds(x), fma(firsts(w), firsts(x), sums))",
        "fma(seconds(w), firsts(x), fma(firsts(w), firsts(x), sums))",
        form="avx512 and not vnni",
    ),
    Mutant(
        "rounded down to bfloat16",
        _AVX512,
        "_mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))",
        "_mm512_setzero_si512()",
        form="avx512 and not vnni",
    ),
    Mutant(
        "NaN rounded to a number",
        _AVX512,
        "_mm512_mask_mov_epi32(rounded, nan, quiet)",
        "_mm512_mask_mov_epi32(rounded, 0, quiet)",
        form="avx512 and not vnni",
    ),
    Mutant(
        "upper weights of 8 bits widened as lower ones",
        _AVX512,
        "_mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1)",
        "_mm512_inserti64x4(_mm512_castsi256_si512(low), low, 1)",
        form="avx512 and not vnni",
    ),
    Mutant(
        "inputs of negative weights keep their sign",
        _AVX512,
        "_mm512_mask_sub_epi8(x, _mm512_movepi8_mask(w.v), zero, x)",
        "_mm512_mask_sub_epi8(x, 0, zero, x)",
        form="avx512 and not vnni",
    ),
    Mutant(
        "no offset of bytes for VNNI",
        _AVX512,
        "#ifdef __AVX512VNNI__\nconstexpr int kInt8Offset = 128;",
        "#ifdef __AVX512VNNI__\nconstexpr int kInt8Offset = 0;",
        form="avx512-vnni",
    ),
    Mutant(
        "no offset of bytes for VNNI of AVX2",
        _AVX2,
        "#ifdef __AVXVNNI__\nconstexpr int kInt8Offset = 128;",
        "#ifdef __AVXVNNI__\nconstexpr int kInt8Offset = 0;",
        form="avx2-vnni",
    ),
    # --------------------------------------------------------------------- sampling
    Mutant(
        "top-p without the token that crosses it",
        _SAMPLE,
        "kept >= row.top_p * whole",
        "kept + double(weight) >= row.top_p * whole",
    ),
    Mutant("top-p of all, not of what top-k left", _SAMPLE, "            whole = 0;\n", ""),
    Mutant(
        "top-k one more",
        _SAMPLE,
        "std::min(count, size_t(row.top_k))",
        "std::min(count, size_t(row.top_k) + 1)",
    ),
    Mutant(
        "min-p of all",
        _SAMPLE,
        "weight < row.min_p * candidates_[0].weight",
        "weight < row.min_p * total_",
    ),
    Mutant("no temperature", _SAMPLE, "div(sub(logit, top), temperature)", "sub(logit, top)"),
    Mutant("another random number", _SAMPLE, "{counter + 1, 0, 0, 0}", "{counter, 0, 0, 0}"),
    Mutant(
        "of equals the higher id",
        _SAMPLE,
        "weight > other.weight : token < other.token",
        "weight > other.weight : token > other.token",
    ),
    Mutant(
        "log of the sum without the largest",
        _SAMPLE,
        "float(most + std::log(total))",
        "float(std::log(total))",
    ),
    Mutant(
        "candidates end at e^-10 of the likeliest",
        _SAMPLE,
        "if (!enough(row)) collect(0, vocab);",
        "",
    ),
    Mutant(
        "positions are not told",
        "draws.py",
        "draw.position = choice.position",
        "draw.position = 0",
    ),
    # ------------------------------------------------------------------------ cache
    Mutant("clear does nothing", "decoder.py", "cache[blocks] = 0", "pass"),
    Mutant(
        "clear leaves V",
        "decoder.py",
        "for cache in (*self._keys, *self._values):",
        "for cache in self._keys:",
    ),
    # ----------------------------------------------------------- matrix registers
    Mutant(
        "matrix: the last block of inputs left out",
        _MATRIX,
        "for (int b = 0; b < w.blocks(); ++b, block += block_bytes(w.kind)) {",
        "for (int b = 0; b + 1 < w.blocks(); ++b, block += block_bytes(w.kind)) {",
        form="software-matrix",
    ),
    Mutant(
        "matrix: outputs 16 to 31 scaled as 0 to 15",
        _MATRIX,
        "load(scales + kLanes) : low",
        "load(scales) : low",
        form="software-matrix",
    ),
    Mutant(
        "matrix: rows of two groups added twice",
        _MATRIX,
        "left_ = {sums_ + skip * kTile, size_ - skip, scales, totals_ + g * size_ * kTile};",
        "left_ = {sums_, size_, scales, totals_ + row * kTile};",
        form="software-matrix",
    ),
    Mutant(
        "matrix: the last group's sums left out",
        _MATRIX,
        "        groups.finish();\n",
        "",
        form="software-matrix",
    ),
    Mutant(
        "matrix: the next tile's first block not decoded",
        _MATRIX,
        "if (++tile_ < last_)",
        "if (++tile_ + 1 < last_)",
        form="software-matrix",
    ),
    Mutant(
        "matrix: two pairs of a block exchanged",
        _MATRIX,
        "source.template half<0>(Q % 2, group)",
        "source.template half<1>(Q % 2, group)",
        form="software-matrix",
    ),
    Mutant(
        "matrix: a block's second inputs decoded as its first",
        _MATRIX,
        "const int group = Q / 2 * 4 + i;",
        "const int group = i;",
        form="software-matrix",
    ),
    Mutant(
        "matrix: a quarter loaded after it was decoded over",
        _MATRIX,
        "return pairs_[Q][0];",
        "return pairs_[(Q + 2) % 4][0];",
        form="software-matrix",
    ),
    Mutant(
        "matrix: the first half of a block's inputs for both",
        _SQUARE,
        "matrix::load<3>(a + kMatrixInputs / 2, stride);\n        matrix::dot<0, 3, 6>(), "
        "matrix::dot<1, 3, 7>();\n    }\n\n    // The same",
        "matrix::load<3>(a, stride);\n        matrix::dot<0, 3, 6>(), "
        "matrix::dot<1, 3, 7>();\n    }\n\n    // The same",
        form="software-matrix",
    ),
    Mutant(
        "matrix: the right half of B for both",
        _SQUARE,
        "matrix::load<4>(left, line), matrix::load<5>(right, line);",
        "matrix::load<4>(right, line), matrix::load<5>(right, line);",
        form="software-matrix",
    ),
    Mutant(
        "matrix: the second 16 ranks of A as the first",
        _LORA,
        "load_pairs(line + 2 * left, right)",
        "load_pairs(line, right)",
        form="software-matrix",
    ),
    Mutant(
        "matrix: half of the inputs of A left out",
        _LORA,
        "k += kMatrixInputs) {",
        "k += 2 * kMatrixInputs) {",
        form="software-matrix",
    ),
    Mutant(
        "matrix: half of the copied inputs of A left out",
        _LORA,
        "k += kMatrixInputs, turn ^= 1) {",
        "k += 2 * kMatrixInputs, turn ^= 1) {",
        form="software-matrix",
    ),
    Mutant(
        "matrix: ranks 16 to 31 of A read as 0 to 15",
        _LORA,
        "registers.add(x + k, x_stride, line, line + 2 * kLanes, stride);",
        "registers.add(x + k, x_stride, line, line, stride);",
        form="software-matrix",
    ),
    Mutant(
        "matrix: A read one rank further on",
        _LORA,
        "const bf16* from = a + 2 * (first + column);",
        "const bf16* from = a + 2 * (first + column) + 2;",
        form="software-matrix",
    ),
    Mutant(
        "matrix: scores of the first 32 dimensions alone",
        _MATRIX_SCORES,
        "for (int d = 0; d < shape.dim; d += 2 * matrix::kRows) {",
        "for (int d = 0; d < 32; d += 2 * matrix::kRows) {",
        form="software-matrix",
    ),
    Mutant(
        "matrix: scores not scaled",
        _ATTENTION,
        "store(scratch + i, mul(load(scratch + i), broadcast(scale)));",
        "store(scratch + i, load(scratch + i));",
        form="software-matrix",
    ),
    Mutant(
        "matrix: V of the first 16 dimensions for all",
        _MATRIX_SCORES,
        "matrix::load<6 + i>(values + i * 2 * kLanes,",
        "matrix::load<6 + i>(values,",
        form="software-matrix",
    ),
    Mutant(
        "few queries: the second numbers of pairs left out",
        _FEW_QUERIES,
        "veneer::add(total, veneer::add(first, second))",
        "veneer::add(total, first)",
        form="software-matrix",
    ),
    Mutant(
        "few queries: both chains added to the total one after the other",
        _FEW_QUERIES,
        "veneer::add(total, veneer::add(first, second))",
        "veneer::add(veneer::add(total, first), second)",
        form="software-matrix",
    ),
    Mutant(
        "few queries: V's denormals kept",
        _FEW_QUERIES,
        "    const FlushDenormals flush;\n    constexpr int vectors = 2;",
        "    constexpr int vectors = 2;",
        form="software-matrix",
    ),
    Mutant(
        "few queries: an odd run at the end left out",
        _FEW_QUERIES,
        "    if (run < end_run)\n",
        "    if (run + 1 < end_run)\n",
        form="software-matrix",
    ),
    Mutant(
        "matrix: the second of two chains of sums left out",
        _SOFTWARE,
        "all[n] += first[n] + second[n];",
        "all[n] += first[n];",
        form="software-matrix",
    ),
    Mutant(
        "matrix: denormals kept",
        _X86,
        "_mm_setcsr(before_ | 0x8040);",
        "_mm_setcsr(before_);",
        form="software-matrix",
    ),
    Mutant(
        "few rows: one sum for both inputs of pairs",
        _FEW,
        "chain.second = fma(w.second, input.second, chain.second);",
        "chain.first = fma(w.second, input.second, chain.first);",
        form="software-matrix",
    ),
    Mutant(
        "few rows: the halves of a tile exchanged for the first inputs",
        _FEW,
        "sums[r][half] = add(add(zeros(), sums[r][half]), more[r][half]);",
        "sums[r][half] = add(more[r][half], add(zeros(), sums[r][1 - half]));",
        form="software-matrix",
    ),
    Mutant(
        "few rows: the second half of a block left out",
        _FEW,
        "sum_groups(block, kSummedGroups, inputs, more);",
        "sum_groups(block, 0, inputs, more);",
        form="software-matrix",
    ),
    # ------------------------------------------------------------------------- ARM
    Mutant(
        "ARM: codes of the register beside it",
        _REGISTERS,
        "group * 64 + part * 16",
        "group * 64 + (part ^ 1) * 16",
        form="neon-bf16",
    ),
    Mutant(
        "ARM: bytes exchanged", _NEON, "Q < 2 ? vtrn1q_u8", "Q > 1 ? vtrn1q_u8", form=_PLAIN
    ),
    Mutant(
        "ARM: a pair taken twice", _NEON, "dot<3>(dot<2>(", "dot<3>(dot<1>(", form="neon-bf16"
    ),
    Mutant(
        "ARM: halves of a pair exchanged", _NEON, "x.second, Q)", "x.first, Q)", form=_PLAIN
    ),
    Mutant(
        "ARM: bfloat16 cut off, not rounded",
        _NEON,
        "vaddq_u32(vaddq_u32(bits, vdupq_n_u32(0x7fff)), odd)",
        "vaddq_u32(bits, vandq_u32(odd, vdupq_n_u32(0)))",
        form=_PLAIN,
    ),
    Mutant(
        "ARM: half of the last ranks' pairs",
        _NEON,
        "std::memcpy(padded, at, size_t(count) * 2 * sizeof(bf16));",
        "std::memcpy(padded, at, size_t(count) * sizeof(bf16));",
        form="neon-bf16",
    ),
    Mutant("ARM: bits of another vector", _NEON, "<< (4 * i)", "<< (3 * i)", form="neon-bf16"),
    Mutant(
        "ARM: the last four of a maximum",
        _NEON,
        "vmaxq_f32(a.v[2], a.v[3])",
        "a.v[2]",
        form=_PLAIN,
    ),
    # -------------------------------------------------------------- inputs of 8 bits
    Mutant(
        "int8: every block with the first one's scale",
        _INT8,
        "unit * x.scale(r, b));",
        "unit * x.scale(r, 0));",
    ),
    Mutant(
        "int8: the head's outputs in the order in which they come",
        _INT8,
        "Source::in_order(first, second);",
        "if (kTile == 0) Source::in_order(first, second);",
    ),
    Mutant(
        "int8: a group's sums with the next block's scale",
        _INT8,
        "left_ = {sums_ + skip * kTile, g * size_, size_ - skip, b, scales};",
        "left_ = {sums_ + skip * kTile, g * size_, size_ - skip, b ^ 1, scales};",
        form="software-matrix",
    ),
    Mutant("int8: 126ths", _INT8_ROWS, "127 / largest : 0);", "126 / largest : 0);"),
    Mutant(
        "int8: a NaN taken for a number",
        _INT8_ROWS,
        "const bool finite = exact == exact;",
        "const bool finite = exact == exact || kBlock > 0;",
    ),
    Mutant(
        "int8: attention's results not rounded",
        _HEADS,
        "if (int8) ctx_.write_int8(at, row, first, end);",
        "if (int8 && row < 0) ctx_.write_int8(at, row, first, end);",
    ),
    Mutant(
        "int8: only a gate's first columns rounded",
        _ROWS,
        "if (int8) ctx_.write_int8(at, row, first, first + count);",
        "if (int8 && first == 0) ctx_.write_int8(at, row, first, first + count);",
    ),
    Mutant(
        "int8: layers' inputs left in bfloat16",
        "decoder.py",
        "int(int8 and struct.kind != BFLOAT16)",
        "int(int8 and struct.kind == 2)",
    ),
)
