"""The version of the package, as pictures and models record it."""

VERSION = "0.1.0"
