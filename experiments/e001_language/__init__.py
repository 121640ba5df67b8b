"""001: language modelling on bytes of Wikipedia; who is best for its FLOPs?"""
