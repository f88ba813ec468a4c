"""Does it matter which experts of a mixture share a pool?"""
