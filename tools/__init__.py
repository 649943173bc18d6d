"""Commands for maintainers: locks, licences, screenshots and generated pages."""
