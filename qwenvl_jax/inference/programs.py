"""Compiled programs that are looked up by a key, so that an engine can compile all of them ahead and then no more."""

import functools
from collections.abc import Callable, Hashable
from typing import Any

import jax

from qwenvl_jax.inference import executables
from qwenvl_jax.inference.layout import Layout


class NotCompiled(RuntimeError):
    """A program was needed, after all had been compiled, that was not among them: a mistake in the list of shapes."""


class Counter:
    """How many programs have been compiled, whether more may be, where their arrays lie, and where they are kept."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self.compiled = 0
        self.sealed = False
        self.kept: executables.Executables | None = None  # while programs are compiled ahead


class Program:
    """A jitted function and what of it is compiled ahead, by keys that stand for the shapes of its arguments.

    `program[key]` is to be called: what `compile` made for the key or, where there is none, the jitted function, which
    compiles when it has to. Once the counter is sealed there must be one. place: where what the function returns lies,
    a method of `Layout`. closed_over: what the function depends on besides its arguments and its source, in full by its
    `repr`. options: those of `jax.jit`.
    """

    def __init__(
        self,
        function: Callable,
        counter: Counter,
        place: Callable[[Layout, Any], Any],
        closed_over: Any = None,
        **options: Any,
    ):
        @functools.wraps(function)
        def counted(*args, **kwargs):
            counter.compiled += 1  # runs once per compilation, when the program is traced
            return place(counter.layout, function(*args, **kwargs))

        self.name = function.__name__
        self.jitted = jax.jit(counted, **options)
        self._identity = function.__module__, function.__qualname__, place.__name__, closed_over, options
        self._counter = counter
        self._ahead: dict[Hashable, jax.stages.Compiled] = {}

    def __getitem__(self, key: Hashable) -> Callable:
        """Raises NotCompiled."""
        if key in self._ahead:
            return self._ahead[key]
        if self._counter.sealed:
            raise NotCompiled(f"{self.name} {key} was not compiled ahead; there is {list(self._ahead)}")
        return self.jitted

    def compile(self, key: Hashable, *args: Any, **kwargs: Any) -> None:
        """Compiles for arguments of these shapes: arrays or `jax.ShapeDtypeStruct`s. Threads may do so side by side.

        A shape without a sharding is that of an array of the host. What was compiled before is read from disk.
        """
        if key in self._ahead:
            return
        args, kwargs = self._counter.layout.given((args, kwargs))
        kept = self._counter.kept
        name = executables.key(self.name, self._identity, executables.arguments((args, kwargs))) if kept else ""
        program = kept.load(name, self._counter.layout.devices) if kept else None
        if program is None:
            program = self.jitted.lower(*args, **kwargs).compile()
            if kept:
                kept.save(name, program)
        self._ahead[key] = program

    def result(self, key: Hashable) -> Any:
        """The shapes of what the program compiled for a key returns."""
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), self._ahead[key].out_info)
