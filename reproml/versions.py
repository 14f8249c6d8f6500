"""The versions that a golden file depends on: of the package, and of the definitions."""

__version__ = "0.1.0"

# The version of the definitions: which exact value each operator returns. A golden file records it.
# It is raised when, and only when, some operator is given another definition.
DEFINITIONS = 2
