"""Which solution does each optimiser pick, on data that decide?"""
