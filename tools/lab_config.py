"""JupyterLab as `make lab` starts it: notebooks are cleaned when saved; no news, no update check."""
import os
import warnings

from nbdev.clean import clean_jupyter

c = get_config()  # noqa: F821 - Jupyter puts get_config here
c.ServerApp.root_dir = os.getcwd()  # the top of the repository, from where clean_jupyter finds a notebook
c.ContentsManager.pre_save_hook = clean_jupyter
c.LabApp.news_url = None
c.LabApp.check_for_updates_class = 'jupyterlab.NeverCheckForUpdate'
warnings.filterwarnings('ignore', 'Overriding existing pre_save_hook')  # Jupyter reads this file twice
