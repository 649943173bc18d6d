"""What maintainers run: the lock of the dependencies and their audit."""
