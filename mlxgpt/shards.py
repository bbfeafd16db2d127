def is_prepared(path):
    return False
