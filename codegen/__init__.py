"""From an attention plan to a kernel: render, compile, cache and the operators that call it."""
