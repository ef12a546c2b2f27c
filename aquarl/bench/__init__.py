"""How fast is this machine at each piece of the work, and how far is that from its limit?"""
