"""The feature cache: frozen layers' outputs kept by view of a sample, in place of running these layers again."""

from .cache import FeatureCache
from .keys import Keys, keys_in
from .loader import CacheLoader
from .report import CacheReport
from .views import BatchDataset

__all__ = ["BatchDataset", "CacheLoader", "CacheReport", "FeatureCache", "Keys", "keys_in"]
