"""Hot paths: each folder holds one public function, its plain reference and its fast implementation.

A process group, where one is needed, is an argument; nothing here knows the model.
"""
