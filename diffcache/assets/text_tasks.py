"""Generate the prompts and answers of the text model.

A sequence holds a prompt and an answer of equal lengths. Both tasks use the vocabulary below.

* ``walk``: walks on a line of ten places. The prompt states the first place and 20 moves (``5+-=++``), and the answer
  states the place after each move (``565567``). A move beyond the end of the line has no effect, so each place depends
  on the one to its left.
* ``sudoku``: 4x4 Sudoku with a unique solution. Three grids are interleaved cell by cell, so the cells of a grid that
  constrain each other are 3 to 45 positions apart. The order of filling is free.
"""

from __future__ import annotations

import itertools

import numpy as np

VOCABULARY = ["[MASK]", "[END]", "A", "B", *"0123456789", "+", "-", "=", "."]
ID = {token: index for index, token in enumerate(VOCABULARY)}
MASK, END = ID["[MASK]"], ID["[END]"]
TASKS = ("walk", "sudoku")
WALK = 21  # tokens of a walk: the first place and 20 moves
PLACES = 10
GIVENS = 7, 10  # fewest and most cells of a puzzle that the prompt states
INTERLEAVED = 3  # grids, with cells in turn
BANK = 16 * INTERLEAVED


def _grids() -> np.ndarray:
    """Return all solved 4x4 grids, [288, 16], with digits 1 to 4."""
    rows = [np.array(p) for p in itertools.permutations((1, 2, 3, 4))]
    found: list[np.ndarray] = []

    def extend(grid: list[np.ndarray]) -> None:
        if len(grid) == 4:
            found.append(np.concatenate(grid))
            return
        for row in rows:
            if any((row == other).any() for other in grid):
                continue
            if len(grid) % 2 == 1 and any(set(grid[-1][c : c + 2]) & set(row[c : c + 2]) for c in (0, 2)):
                continue
            extend([*grid, row])

    extend([])
    return np.array(found)


GRIDS = _grids()


def _puzzle(random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Return the givens (0 where empty) and the solution of a puzzle with a unique solution."""
    solution = GRIDS[random.integers(len(GRIDS))]
    while True:
        given = np.zeros(16, bool)
        given[random.permutation(16)[: random.integers(GIVENS[0], GIVENS[1] + 1)]] = True
        if (GRIDS[:, given] == solution[given]).all(1).sum() == 1:
            return np.where(given, solution, 0), solution


def walk(length: int, random: np.random.Generator) -> tuple[list[int], list[int]]:
    """Return a prompt and an answer of ``length`` tokens each."""
    prompt = answer = "A"
    for _ in range((length - 1) // WALK):
        place = int(random.integers(PLACES))
        moves = random.integers(-1, 2, WALK - 1)
        prompt += str(place) + "".join("-=+"[move + 1] for move in moves)
        answer += str(place)
        for move in moves:
            place = min(max(place + int(move), 0), PLACES - 1)
            answer += str(place)
    return _padded(prompt, length), _padded(answer, length)


def sudoku(length: int, random: np.random.Generator) -> tuple[list[int], list[int]]:
    """Return a prompt and an answer of ``length`` tokens each."""
    prompt, answer = "B", "B"
    for _ in range((length - 1) // BANK):
        puzzles = [_puzzle(random) for _ in range(INTERLEAVED)]
        prompt += "".join(str(p[0][cell]) if p[0][cell] else "." for cell in range(16) for p in puzzles)
        answer += "".join(str(p[1][cell]) for cell in range(16) for p in puzzles)
    return _padded(prompt, length), _padded(answer, length)


def _padded(text: str, length: int) -> list[int]:
    return [ID[character] for character in text] + [END] * (length - len(text))


def batch(task: str, count: int, length: int, seed: int | np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Return prompts and answers, int64 [count, length] each, of half a canvas of ``2 * length`` tokens."""
    random = np.random.default_rng(seed)
    make = {"walk": walk, "sudoku": sudoku}[task]
    pairs = [make(length, random) for _ in range(count)]
    return np.array([p for p, _ in pairs]), np.array([a for _, a in pairs])


def solved(prompt: np.ndarray) -> np.ndarray:
    """Return the answer to a prompt, int64 [n].

    Args:
        prompt: int64 [n], the ids of a prompt that ``batch`` made.

    Raises:
        ValueError: The prompt has another form.
    """
    text = [VOCABULARY[i] for i in prompt]
    body = text[1 : text.index("[END]")] if "[END]" in text else text[1:]
    if text[0] == "A":
        answer, place = "A", 0
        for token in body:
            place = int(token) if token.isdigit() else min(max(place + "-=+".index(token) - 1, 0), PLACES - 1)
            answer += str(place)
    else:
        answer = "B"
        for start in range(0, len(body), BANK):
            cells = np.array([0 if token == "." else int(token) for token in body[start : start + BANK]])
            grids = [_solution(cells[which::INTERLEAVED]) for which in range(INTERLEAVED)]
            answer += "".join(str(grid[cell]) for cell in range(16) for grid in grids)
    return np.array(_padded(answer, len(prompt)))


def _solution(given: np.ndarray) -> np.ndarray:
    """Return the only grid with these cells, int64 [16]. 0 is an empty cell."""
    fitting = GRIDS[((GRIDS == given) | (given == 0)).all(1)]
    if len(fitting) != 1:
        raise ValueError(f"{len(fitting)} grids have these cells; 1 is needed")
    found: np.ndarray = fitting[0]
    return found
