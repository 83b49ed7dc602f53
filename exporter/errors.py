"""The exception tree. Every error that a user can meet says what to do next.

EbfwError
├── SettingsError      a mistake in the environment, a flag or a file; names the key
├── KernelError        the kernel, or this container, refused something
│   ├── NotPermitted   root or a capability is missing
│   └── Unsupported    this kernel lacks a feature
├── PinError           what lies under the pin path is not ours or not usable
└── InventoryError     the file of the inventory is none, is damaged, or cannot be had
"""


class EbfwError(Exception):
    """Base of all errors that ebfw raises on purpose; its text is one clear sentence."""


class SettingsError(EbfwError):
    """A setting is wrong. The text names the key, the value and, where one is near, the right one."""


class KernelError(EbfwError):
    """The kernel refused an operation that ebfw needs."""


class NotPermitted(KernelError):
    """Root or a capability is missing."""


class Unsupported(KernelError):
    """This kernel lacks a feature."""


class PinError(EbfwError):
    """The pin path cannot be used as it is."""


class InventoryError(EbfwError):
    """The inventory's file is none of ours, damaged, or of a later version; or it cannot be read or written."""
