"""What an import of a package that a run can do without may raise."""

# NVIDIA's packages raise these where they are absent, incomplete, or built for another torch or CUDA: the
# loader of Transformer Engine asserts that its three packages have one version, and looks for its libraries.
IMPORT_ERRORS = (AssertionError, ImportError, OSError, RuntimeError)
