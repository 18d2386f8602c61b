"""The curvature of any PyTorch network, block by block.

Names are loaded when they are first used (PEP 562), so that ``import diagnostics`` costs next to nothing beyond torch;
``__init__.pyi`` lists them with their modules.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
