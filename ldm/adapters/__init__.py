import ldm.nn  # noqa: F401  before peft: it repairs a mismatched torchvision
