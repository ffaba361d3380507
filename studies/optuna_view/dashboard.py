"""optuna-dashboard over the studies of a store, to look at and not to touch."""

import json
from collections.abc import Iterable
from importlib import import_module
from typing import TYPE_CHECKING

from apportion.errors import InvalidInput
from apportion.studies.database.store import Store
from apportion.studies.optuna_view.storage import READ_ONLY, ReadOnlyStorage

if TYPE_CHECKING:
    from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

READING = ("GET", "HEAD")


def dashboard_app(store: Store) -> "WSGIApplication":
    """A WSGI application that shows all studies of the store while they are run.

    Requests that would change something are answered with 405. It asks nobody for a name: serve it
    on 127.0.0.1, or behind what does.

    Raises InvalidInput where optuna-dashboard is missing.
    """
    try:
        dashboard = import_module("optuna_dashboard")
    except ModuleNotFoundError:
        raise InvalidInput(
            'optuna-dashboard is missing: pip install "apportion[dashboard]"'
        ) from None
    pages: WSGIApplication = dashboard.wsgi(ReadOnlyStorage(store))

    def read_only(environ: "WSGIEnvironment", start_response: "StartResponse") -> Iterable[bytes]:
        if environ["REQUEST_METHOD"] in READING:
            return pages(environ, start_response)
        headers = [("Content-Type", "application/json"), ("Allow", ", ".join(READING))]
        start_response("405 Method Not Allowed", headers)
        return [json.dumps({"reason": READ_ONLY}).encode()]

    return read_only
