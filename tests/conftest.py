"""Settings that all tests share."""

from hypothesis import settings

# Time limits say more about the machine than about the code; the same examples every time make failures reproducible.
settings.register_profile("fheq", deadline=None, derandomize=True)
settings.load_profile("fheq")
