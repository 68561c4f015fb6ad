"""For `make test-notebooks`: nbval waits 5 s for a cell's outputs, which a busy machine may take."""


def pytest_itemcollected(item):
    if hasattr(item, "output_timeout"):
        item.output_timeout = 600  # s
