"""Leave out messages that diffusers and torchao log when diffusers is imported, and that ask nothing of the user.

diffusers imports torchao wherever it is installed, for its quantizers. torchao registers two enums in a way that torch
deprecates, and torch logs a line for each. diffusers then looks for classes that newer versions of torchao do not have,
and logs that as well. A checkpoint that needs one of these classes still raises an error when it is loaded.
"""

from __future__ import annotations

import logging

MESSAGES = {  # name of a logger -> a part of the message that is left out
    "torch.utils._pytree": "register_constant() on Enum subclasses is deprecated",
    "diffusers.quantizers.torchao.torchao_quantizer": "Unable to import `torchao` Tensor objects",
}


class _Without(logging.Filter):
    """Drops the records with a text in their message."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.text = text

    def filter(self, record: logging.LogRecord) -> bool:
        """Return whether the record is logged."""
        return self.text not in record.getMessage()


def leave_out() -> None:
    """Leave out the messages of ``MESSAGES``. All other messages of these loggers are logged."""
    for name, text in MESSAGES.items():
        logger = logging.getLogger(name)
        if not any(isinstance(one, _Without) for one in logger.filters):
            logger.addFilter(_Without(text))
