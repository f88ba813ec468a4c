"""Do adapters that learn to plan use more ranks than those that learn to reason?"""
