"""Layers on one method of one object: order, removal in any order, wrappers of other packages, copies."""

from __future__ import annotations

import copy
import functools
import gc
import inspect
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diffcache.errors import AcceleratedObjectCopied
from diffcache.patch import Layers, Undo, layer, on_top

pytestmark = pytest.mark.fast


class Thing:
    def __init__(self, name: str = "thing") -> None:
        self.name = name

    def method(self, x: str, *, tail: str = "") -> str:
        """What it does."""
        return f"{self.name}({x}){tail}"


def around(sign: str) -> Callable[..., str]:
    return lambda inner, *args, **kwargs: f"{sign}[{inner(*args, **kwargs)}]"


def test_the_newest_layer_is_outermost_and_arguments_pass_through() -> None:
    thing = Thing()
    layer(thing, "method", around("a"))
    layer(thing, "method", around("b"))
    assert thing.method("x", tail="!") == "b[a[thing(x)!]]"


def test_a_layer_may_change_arguments_and_leave_out_the_call() -> None:
    thing = Thing()
    layer(thing, "method", lambda inner, x: inner(x.upper()))
    assert thing.method("x") == "thing(X)"
    layer(thing, "method", lambda inner, x: "skipped")
    assert thing.method("x") == "skipped"


@given(st.lists(st.tuples(st.sampled_from("abc"), st.booleans()), max_size=12))
def test_layers_come_off_in_any_order_and_the_last_leaves_nothing(moves: list[tuple[str, bool]]) -> None:
    thing, other = Thing(), Thing("other")
    before = dict(vars(thing))
    on: list[tuple[str, Undo]] = []
    for sign, put in moves:
        if put or not on:
            on.append((sign, layer(thing, "method", around(sign))))
        else:
            on.pop(len(moves) % len(on))[1]()
        expected = "thing(x)"
        for s, _ in on:
            expected = f"{s}[{expected}]"
        assert thing.method("x") == expected
        assert other.method("x") == "other(x)"
    for _, off in reversed(on):
        off()
    assert vars(thing) == before
    assert list(vars(thing)) == list(before)


def test_taking_a_layer_off_twice_is_harmless() -> None:
    thing = Thing()
    first = layer(thing, "method", around("a"))
    same = around("a")
    layer(thing, "method", same)
    layer(thing, "method", same)
    first()
    first()
    assert thing.method("x") == "a[a[thing(x)]]"


def test_the_class_is_never_touched() -> None:
    before = dict(vars(Thing))
    off = layer(Thing(), "method", around("a"))
    assert dict(vars(Thing)) == before
    off()


def test_an_exception_passes_through_and_changes_nothing() -> None:
    thing = Thing()
    layer(thing, "method", around("a"))
    with pytest.raises(TypeError):
        thing.method()  # type: ignore[call-arg]
    assert thing.method("x") == "a[thing(x)]"


def test_the_signature_is_the_method_s_own() -> None:
    thing = Thing()
    before = inspect.signature(thing.method)
    layer(thing, "method", around("a"))
    assert inspect.signature(thing.method) == before


def test_an_attribute_found_on_the_object_is_called_and_put_back() -> None:
    thing = Thing()
    mine = lambda x: f"mine({x})"  # noqa: E731
    thing.method = mine  # type: ignore[method-assign, assignment]
    off = layer(thing, "method", around("a"))
    assert thing.method("x") == "a[mine(x)]"
    off()
    assert vars(thing)["method"] is mine


def test_below_a_foreign_wrapper_that_stays_the_shell_passes_calls_through() -> None:
    thing = Thing()
    off = layer(thing, "method", around("a"))
    held = thing.method
    stranger = lambda x: f"s[{held(x)}]"  # noqa: E731
    thing.method = stranger  # type: ignore[method-assign, assignment]
    assert thing.method("x") == "s[a[thing(x)]]"
    off()
    assert thing.method("x") == "s[thing(x)]"
    assert vars(thing)["method"] is stranger


def test_a_shell_restored_by_a_foreign_wrapper_leaves_at_the_next_call() -> None:
    thing = Thing()
    off = layer(thing, "method", around("a"))
    held = thing.method
    thing.method = lambda x: held(x)  # type: ignore[method-assign, assignment]
    off()
    thing.method = held  # type: ignore[method-assign]
    assert thing.method("x") == "thing(x)"
    assert "method" not in vars(thing)


def test_a_layer_is_on_top_until_a_foreign_wrapper_is() -> None:
    thing, mine = Thing(), around("a")
    assert not on_top(thing, "method", mine)
    off = layer(thing, "method", mine)
    layer(thing, "method", around("b"))
    assert on_top(thing, "method", mine)
    held = thing.method
    thing.method = lambda x: held(x)  # type: ignore[method-assign, assignment]
    assert not on_top(thing, "method", mine)
    thing.method = held  # type: ignore[method-assign]
    off()
    assert not on_top(thing, "method", mine)


def test_a_foreign_wrapper_gets_only_the_call() -> None:
    """functools.update_wrapper, as accelerate uses it, copies the ``__dict__`` of what it wraps."""
    thing = Thing()
    off = layer(thing, "method", around("a"))
    held = functools.partial(thing.method)
    functools.update_wrapper(held, thing.method)
    assert not set(Layers.__slots__) & set(vars(held))
    off()
    assert held("x") == "thing(x)"


def test_layers_do_not_keep_their_owner_alive() -> None:
    thing = Thing()
    layer(thing, "method", around("a"))
    there = weakref.ref(thing)
    gc.disable()
    try:
        del thing
        assert there() is None
    finally:
        gc.enable()


def test_taking_off_a_layer_of_an_owner_that_is_gone_is_harmless() -> None:
    thing = Thing()
    off = layer(thing, "method", around("a"))
    del thing
    off()


def test_copies_are_refused_by_default() -> None:
    thing = Thing()
    off = layer(thing, "method", around("a"))
    for action in (copy.deepcopy, pickle.dumps):
        with pytest.raises(AcceleratedObjectCopied, match=r"of Thing was asked for while it is accelerated; the copy"):
            action(thing)
    off()
    assert copy.deepcopy(thing).method("x") == pickle.loads(pickle.dumps(thing)).method("x") == "thing(x)"


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda thing: pickle.loads(pickle.dumps(thing))])
def test_allowed_copies_get_their_plain_method(copied: Callable[[Any], Any]) -> None:
    thing = Thing()
    layer(thing, "method", around("a"), copies=True)
    twin = copied(thing)
    twin.name = "twin"
    assert twin.method("x") == "twin(x)"
    assert thing.method("x") == "a[thing(x)]"


def test_a_copy_gets_what_was_found_on_the_object() -> None:
    thing = Thing()
    thing.method = functools.partial(str.format, "mine({0})")  # type: ignore[method-assign, assignment]
    layer(thing, "method", around("a"), copies=True)
    assert copy.deepcopy(thing).method("x") == "mine(x)"


def test_a_copy_of_the_layers_alone_is_refused() -> None:
    thing = Thing()
    layer(thing, "method", around("a"))
    assert isinstance(thing.method, Layers)
    with pytest.raises(AcceleratedObjectCopied):
        copy.deepcopy(thing.method)


def test_a_copied_dict_can_be_put_back() -> None:
    """Some pipelines keep a noise scheduler's state so, and give it back before the next part of a picture."""
    thing = Thing()
    undo = layer(thing, "method", around("a"), copies=True)
    thing.__dict__.update(copy.deepcopy(vars(thing)))
    assert thing.method("x") == "a[thing(x)]"
    undo()
    assert vars(thing) == vars(Thing())
