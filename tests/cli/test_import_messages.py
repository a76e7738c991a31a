"""Commands print no messages of torchao that ask nothing of the user, and all other messages."""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Iterator

import pytest

from diffcache import cli
from diffcache.cli import _import_messages

IMPORTS = """
import sys
sys.argv = ["diffcache", "--version"]
from diffcache.cli import main
try:
    main()
finally:
    import diffusers.quantizers.torchao.torchao_quantizer
    import logging
    logging.getLogger("torch.utils._pytree").warning("another message")
"""


@pytest.fixture(autouse=True)
def filters() -> Iterator[None]:
    """The loggers without the filters of earlier tests. They are restored afterwards."""
    loggers = [logging.getLogger(name) for name in _import_messages.MESSAGES]
    before = [list(logger.filters) for logger in loggers]
    for logger in loggers:
        logger.filters.clear()
    yield
    for logger, found in zip(loggers, before, strict=True):
        logger.filters[:] = found


@pytest.mark.fast
@pytest.mark.parametrize("words", [("--version",), ("--version", "--debug")])
def test_only_the_named_messages_are_left_out_and_none_with_debug(
    words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["diffcache", *words])
    for _ in range(2):
        with pytest.raises(SystemExit):
            cli.main()
    for name, text in _import_messages.MESSAGES.items():
        logger = logging.getLogger(name)
        assert len(logger.filters) == ("--debug" not in words)
        for message, kept in ((f"<enum 'Kind'>: {text} and more", "--debug" in words), ("another message", True)):
            record = logger.makeRecord(name, logging.WARNING, __file__, 1, message, (), None)
            assert bool(logger.filter(record)) is kept


def test_importing_diffusers_after_a_command_began_prints_nothing_about_torchao() -> None:
    pytest.importorskip("torchao")
    run = subprocess.run([sys.executable, "-c", IMPORTS], capture_output=True, text=True, check=True)
    assert "another message" in run.stderr
    assert "torchao" not in run.stderr
    assert "register_constant" not in run.stderr
