"""Scorers: functions that score each sample by itself and the prompt that it was made for.

Alignment with the prompt and aesthetics are scored by networks that users provide: ImageReward, HPS, PickScore, a
classifier. A scorer wraps a callable ``(pictures, prompts) -> scores``:

    pictures  float [N, H, W, 3] in 0..1, or the other output of the pipeline: videos are [N, F, H, W, 3]
    prompts   list of N texts
    scores    N numbers: a list, an array or a tensor

    def reward(pictures, prompts):
        return [model.score(prompt, to_pil(picture)) for picture, prompt in zip(pictures, prompts)]

    taste = scorer(reward, title="ImageReward")
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from diffcache import registry
from diffcache.errors import BadOption, UnknownName
from diffcache.eval.metrics._about import About, Better
from diffcache.eval.metrics._checks import SamplesError, numbers, one_per_sample

Judge = Callable[[np.ndarray, Sequence[str]], Any]
Classifier = Callable[[np.ndarray], Any]

ALLOWED = "a callable (pictures, prompts) -> scores, or its address as text, 'package.module:function'"


@dataclass(frozen=True, slots=True)
class Scorer:
    """A named callable that scores pictures. Its results are checked.

    Attributes:
        name: Name of the scorer.
        about: Description for the readers of a table.
        judge: The callable ``(pictures, prompts) -> scores``.
    """

    name: str
    about: About
    judge: Judge

    def __call__(self, pictures: np.ndarray, prompts: Sequence[str]) -> np.ndarray:
        """Return the scores of pictures, float64 [N].

        Raises:
            SamplesError: If there is not one prompt per picture, or the callable does not return one finite number per
                picture.
        """
        if isinstance(prompts, str) or len(prompts) != len(pictures):
            found = "one text" if isinstance(prompts, str) else f"{len(prompts)} prompts"
            raise SamplesError(f"scorer {self.name!r}", f"{found} for {len(pictures)} pictures", "a prompt per picture")
        return one_per_sample(f"scorer {self.name!r}", self.judge(pictures, list(prompts)), len(pictures))


def scorer(
    judge: Judge | str,
    *,
    name: str = "",
    title: str = "",
    unit: str = "",
    better: Better = "higher",
    about: str = "",
) -> Scorer:
    """Return a scorer that wraps a callable.

    Args:
        judge: A callable ``(pictures, prompts) -> scores``, a Scorer, or the address ``"package.module:function"``,
            whose module is imported.
        name: Name of the scorer. The default is the name of the callable.
        title: Title of the column. The default is the name.
        unit: Unit of the scores.
        better: Whether "higher" or "lower" scores are better.
        about: Description for the readers of a table.

    Returns:
        The scorer. A Scorer keeps its description, and its name if ``name`` is empty.

    Raises:
        BadOption: If ``judge`` is not callable, or not an address.
        UnknownName: If there is nothing at the address.
    """
    if isinstance(judge, str):
        if ":" not in judge:
            raise BadOption("scorer", judge, ALLOWED)
        found: Any = registry.load(__package__, judge)
    else:
        found = judge
    if not callable(found):
        raise BadOption("scorer", judge if isinstance(judge, str) else type(judge).__name__, ALLOWED)
    if isinstance(found, Scorer):
        return Scorer(name or found.name, found.about, found.judge)
    name = name or getattr(found, "__name__", type(found).__name__)
    return Scorer(
        name, About(title or name, unit, better, about or f"Mean of what {name} says of each picture."), found
    )


def class_accuracy(
    classifier: Classifier, names: Sequence[str] | None = None, *, name: str = "class accuracy"
) -> Scorer:
    """Return a scorer that gives 1 if a classifier finds the requested class in a picture, else 0.

    The scorer raises SamplesError if the classifier returns another shape or NaN, and UnknownName for a prompt that is
    not a class.

    Args:
        classifier: Maps pictures [N, H, W, 3] to [N, classes]. The class with the largest number is the result.
        names: Names of the classes in that order, as in the prompts. None: prompts are the numbers of the classes.
        name: Name of the scorer.

    Raises:
        BadOption: If two classes have the same name.
    """
    known = None if names is None else {label: i for i, label in enumerate(names)}
    if known is not None and len(known) != len(names or ()):
        raise BadOption("names", list(names or ()), "a different name for each class")

    def judge(pictures: np.ndarray, prompts: Sequence[str]) -> np.ndarray:
        votes = numbers(classifier(pictures))
        classes = votes.shape[1] if votes.ndim == 2 else 0
        if len(votes) != len(pictures) or classes < 1 or (known is not None and classes != len(known)):
            wanted = f"[{len(pictures)}, {'classes' if known is None else len(known)}]"
            raise SamplesError(f"classifier of {name!r}", f"it returned shape {list(votes.shape)}", wanted)
        if np.isnan(votes).any():
            raise SamplesError(f"classifier of {name!r}", "it returned NaN", "a number per class")
        asked = known if known is not None else {str(i): i for i in range(classes)}
        for prompt in prompts:
            if str(prompt) not in asked:
                raise UnknownName("class", str(prompt), list(asked), next_step="Prompts are looked up in names=.")
        return np.asarray(votes.argmax(axis=1) == [asked[str(prompt)] for prompt in prompts])

    text = "The share of pictures that a classifier takes for the class that was asked for: 1 is all of them."
    return Scorer(name, About(name, "", "higher", text), judge)
