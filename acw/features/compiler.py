"""Puts off the import of torch's compiler, which takes longer than all else that a prediction imports.

timm's networks and their first pass on the device "meta" import it without compiling anything: for the decorator
`disable` of what is not to be compiled, and for a function that torchvision's `ops.roi_align` asks when it is called.
Both wait here for a compiler to be there.
"""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

COMPILER, UTILS = "torch._dynamo", "torch._dynamo.utils"


@contextmanager
def compiler_put_off() -> Iterator[None]:
    """Within it, the compiler is imported only for what it is needed for; what was decorated knows it when it comes."""
    if COMPILER in sys.modules:
        yield
        return
    deferred = [_Deferred(COMPILER, disable=_disable), _Deferred(UTILS, is_compile_supported=_is_compile_supported)]
    sys.modules.update({module.__name__: module for module in deferred})
    try:
        yield
    finally:
        _take_away()


class _Deferred(ModuleType):
    """In the place of a module with one of its functions; whoever wants another gets it from the module itself."""

    def __init__(self, name: str, **functions: Callable[..., Any]) -> None:
        super().__init__(name)
        vars(self).update(functions)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        _take_away()
        return getattr(importlib.import_module(self.__name__), name)


def _take_away() -> None:
    for name in (COMPILER, UTILS):
        if isinstance(sys.modules.get(name), _Deferred):
            del sys.modules[name]


def _disable(function: Callable[..., Any] | None = None, *options: Any, **named: Any) -> Any:
    """The compiler's `disable`, which is asked when the function is called, if there is a compiler by then."""
    if function is None:
        return lambda function: _disable(function, *options, **named)

    @functools.wraps(function)
    def called(*arguments: Any, **keywords: Any) -> Any:
        compiler = sys.modules.get(COMPILER)
        disable = None if isinstance(compiler, _Deferred) else getattr(compiler, "disable", None)
        whole = disable(function, *options, **named) if disable else function
        return whole(*arguments, **keywords)

    return called


def _is_compile_supported(device: Any) -> Any:
    _take_away()
    return importlib.import_module(UTILS).is_compile_supported(device)
