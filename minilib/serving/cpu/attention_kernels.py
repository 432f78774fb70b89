"""The kernels behind attention.py, in fp32: they take addresses, sizes and strides, as those on a GPU do."""

from __future__ import annotations

import numpy as np
from numba import carray, prange, types

from minilib.serving.cpu.machine_code import FP32, ROWS, WIDTH, kernel, pointer, rows_times_panel
from minilib.serving.cpu.row_kernels import exp, numbers_at


@kernel(types.void(*[types.int64] * 11))
def store_in_slots(tokens, heads, head_dim, page_size, slots, k, k_stride, v, v_stride, keys, values):
    """New keys and values of each token into its slot, slots counted through all pages of the pool."""
    numbers = carray(pointer(slots), (tokens,), np.int64)
    for token in prange(tokens):
        at = np.int64(token)
        page, place = divmod(numbers[at], page_size)
        for head in range(heads):
            first = ((page * heads + head) * page_size + place) * head_dim
            key, value = numbers_at(keys, first, head_dim), numbers_at(values, first, head_dim)
            new_key = numbers_at(k, at * k_stride + head * head_dim, head_dim)
            new_value = numbers_at(v, at * v_stride + head * head_dim, head_dim)
            for i in range(head_dim):
                key[i] = new_key[i]
                value[i] = new_value[i]


@kernel(types.void(*[types.int64] * 14, types.float32))
def attend_to_pages(
    sequences, kv_heads, parts, group, head_dim, page_size, of_sequences, table_width, q, q_stride, keys, values, out,
    out_stride, scale,
):  # fmt: skip
    """of_sequences: a row for each of the sequences: number of its token, length, page table."""
    rows = carray(pointer(of_sequences), (sequences, 2 + table_width), np.int64)
    heads = kv_heads // parts * group  # of a task: those of `parts` tasks a sequence that read the same pages in order
    for task in prange(sequences * parts):
        part, sequence = divmod(np.int64(task), sequences)
        token, length = rows[sequence, 0], rows[sequence, 1]
        weights = np.empty(page_size, np.float32)
        highest, total = np.full(heads, np.float32(-np.inf)), np.zeros(heads, np.float32)
        first_head = part * heads
        queries = carray(pointer(q + 4 * (token * q_stride + first_head * head_dim)), (heads, head_dim), np.float32)
        mixed = carray(pointer(out + 4 * (token * out_stride + first_head * head_dim)), (heads, head_dim), np.float32)
        mixed[:] = 0
        for first in range(0, length, page_size):
            page, used = rows[sequence, 2 + first // page_size], min(page_size, length - first)
            for head in range(heads):
                at = (page * kv_heads + (first_head + head) // group) * page_size * head_dim
                before = highest[head]
                for slot in range(used):
                    key = numbers_at(keys, at + slot * head_dim, head_dim)
                    score = np.float32(0)
                    for i in range(head_dim):
                        score += queries[head, i] * key[i]
                    weights[slot] = score * scale
                    highest[head] = max(highest[head], weights[slot])
                most = highest[head] if highest[head] > -np.inf else np.float32(0)  # -inf - -inf is no number
                correction = exp(before - most)
                for slot in range(used):
                    weights[slot] = exp(weights[slot] - most)
                total[head] *= correction
                for slot in range(used):
                    total[head] += weights[slot]
                for i in range(head_dim):
                    mixed[head, i] *= correction
                whole = used // 4 * 4
                for slot in range(0, whole, 4):  # four at a time, for what is mixed is then read and written once
                    v = carray(pointer(values + 4 * (at + slot * head_dim)), (4, head_dim), np.float32)
                    w = weights[slot : slot + 4]
                    for i in range(head_dim):
                        mixed[head, i] += w[0] * v[0, i] + w[1] * v[1, i] + w[2] * v[2, i] + w[3] * v[3, i]
                for slot in range(whole, used):
                    value = numbers_at(values, at + slot * head_dim, head_dim)
                    for i in range(head_dim):
                        mixed[head, i] += weights[slot] * value[i]
        for head in range(heads):
            for i in range(head_dim):
                mixed[head, i] /= total[head]


@kernel(types.void(*[types.int64] * 9))
def into_panels(kv_heads, head_dim, page_size, length, table, keys, values, k_panels, v_panels):
    """Keys of one sequence with lanes over slots, values with lanes over the numbers of a head."""
    pages = carray(pointer(table), (length,), np.int64)
    k_width, v_width = (length + WIDTH - 1) // WIDTH, (head_dim + WIDTH - 1) // WIDTH
    of_keys = carray(pointer(k_panels), (kv_heads, k_width, head_dim, WIDTH), np.float32)
    of_values = carray(pointer(v_panels), (kv_heads, v_width, length, WIDTH), np.float32)
    for number in prange(kv_heads * k_width):
        head, panel = divmod(np.int64(number), k_width)
        for slot in range(panel * WIDTH, min(length, (panel + 1) * WIDTH)):
            at = ((pages[slot // page_size] * kv_heads + head) * page_size + slot % page_size) * head_dim
            key, value = numbers_at(keys, at, head_dim), numbers_at(values, at, head_dim)
            for i in range(head_dim):
                of_keys[head, panel, i, slot % WIDTH] = key[i]
            for i in range(head_dim):
                of_values[head, i // WIDTH, slot, i % WIDTH] = value[i]


@kernel(types.void(*[types.int64] * 11, types.float32))
def attend_to_panels(queries, length, heads, group, head_dim, q, q_stride, k_panels, v_panels, out, out_stride, scale):
    """The queries are the last of so many slots; out has rows as q does."""
    k_width, v_width = (length + WIDTH - 1) // WIDTH, (head_dim + WIDTH - 1) // WIDTH
    blocks = (queries + ROWS - 1) // ROWS
    for task in prange(heads * blocks):
        head, block = divmod(np.int64(task), blocks)  # so that cores share heads, and none has the long rows alone
        start, rows = block * ROWS, min(ROWS, queries - block * ROWS)
        seen = length - queries + start + rows  # keys, by the last row
        scores, mixed = np.empty((ROWS, k_width * WIDTH), np.float32), np.empty((ROWS, v_width * WIDTH), np.float32)
        totals = np.zeros(ROWS, np.float32)
        at = q + 4 * (start * q_stride + head * head_dim)
        for panel in range((seen + WIDTH - 1) // WIDTH):
            keys = k_panels + 4 * (head // group * k_width + panel) * head_dim * WIDTH
            to = scores.ctypes.data + 4 * panel * WIDTH
            rows_times_panel(FP32, rows, at, q_stride, keys, to, k_width * WIDTH, head_dim)
        for row in range(rows):
            own = length - queries + start + row + 1
            highest = np.float32(-np.inf)
            for slot in range(own):
                highest = max(highest, scores[row, slot])
            if highest == -np.inf:
                highest = np.float32(0)
            for slot in range(own):
                scores[row, slot] = exp((scores[row, slot] - highest) * scale)
            for slot in range(own):
                totals[row] += scores[row, slot]
            scores[row, own:seen] = 0
        for panel in range(v_width):
            values = v_panels + 4 * (head // group * v_width + panel) * length * WIDTH
            to = mixed.ctypes.data + 4 * panel * WIDTH
            rows_times_panel(FP32, rows, scores.ctypes.data, k_width * WIDTH, values, to, v_width * WIDTH, seen)
        for row in range(rows):
            to_row = numbers_at(out, (start + row) * out_stride + head * head_dim, head_dim)
            for i in range(head_dim):
                to_row[i] = mixed[row, i] / totals[row]
