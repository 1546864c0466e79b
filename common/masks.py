"""Which patches of an image are masked, as a function of numbers that belong to the image alone."""

import itertools

import numpy as np

from common import rng

TRIES = 10  # places that are tried for a block, of which the first that fits is taken


def block_masks(seeds, grid, count, minimum=16, aspect=0.3, exact=True):
    """Masks made of rectangular blocks that may overlap (Bao et al. 2022, BEiT, algorithm 1): bool (B, rows * columns),
    True where a patch is masked, patches row by row.

    seeds: (B,) or (B, 1) uniforms of the samples, as from `rng.uniforms`: a mask is a function of its own. grid: (rows,
    columns) of patches. count: patches to mask, one number or (B,). minimum: of a block's area, which is uniform up to
    what is still to be masked; the ratio of its sides is log-uniform in [aspect, 1 / aspect]. exact: the next block is
    sought until `count` is met, which takes few rounds; else a mask ends as soon as 10 places for a block in succession
    add nothing or too much, so that some masks fall a little short of it.
    """
    rows, columns = grid
    seeds = (np.reshape(seeds, -1) * 2.0**53).astype(np.int64)
    missing, low = np.broadcast_to(count, len(seeds)).astype(np.float64), np.log(aspect)
    if np.max(count) > rows * columns or max(1, round(minimum**0.5)) >= min(grid):
        blocks = f"{np.max(count)} patches in blocks of {minimum} or more"
        raise ValueError(f"{blocks} do not fit into a grid of {rows} x {columns}")
    masks = np.zeros((len(seeds), rows, columns), bool)
    table = np.zeros((len(seeds), rows + 1, columns + 1), np.int64)  # masked patches above and to the left
    y, x = np.arange(rows)[:, None], np.arange(columns)
    active = np.flatnonzero(missing > 0)
    for turn in itertools.count():
        if not len(active):
            return masks.reshape(len(seeds), rows * columns)
        u = rng.uniforms(0, turn, seeds[active], rng.SCRIPT, 4 * TRIES).reshape(-1, TRIES, 4)
        most = missing[active, None]
        area, ratio = minimum + (most - minimum) * u[:, :, 0], np.exp(low - 2 * low * u[:, :, 1])
        height, width = (np.rint(np.sqrt(a)).astype(np.int64) for a in (area * ratio, area / ratio))
        fits = (height < rows) & (width < columns)
        top = (u[:, :, 2] * (rows - height + 1)).astype(np.int64) * fits
        left = (u[:, :, 3] * (columns - width + 1)).astype(np.int64) * fits
        bottom, right, of = top + height * fits, left + width * fits, active[:, None]
        masked = table[of, bottom, right] - table[of, top, right] - table[of, bottom, left] + table[of, top, left]
        new = height * width * fits - masked
        good = (new > 0) & (new <= most)
        found = good.any(1)
        row, first = np.flatnonzero(found), good.argmax(1)[found]
        top, bottom, left, right = (part[row, first, None, None] for part in (top, bottom, left, right))
        changed = active[row]
        masks[changed] |= (y >= top) & (y < bottom) & (x >= left) & (x < right)
        table[changed, 1:, 1:] = masks[changed].cumsum(1).cumsum(2)
        missing[changed] -= new[row, first]
        active = active[(missing[active] > 0) & (found | exact)]
