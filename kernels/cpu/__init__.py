"""C++ operators for processors that multiply bfloat16 themselves; compiled where they run."""
