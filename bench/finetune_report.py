"""Tables of bench_finetune.py's rows."""


def write(path, rows): ...
def tables(rows):
    return ""
