"""The version, for the package and for its build, which reads this line without importing anything."""

__version__ = "0.1.0"
