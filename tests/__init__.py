"""The tests: one file per module, contract suites for what can be reached in several ways."""
