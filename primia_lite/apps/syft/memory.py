"""Hospitals and a researcher in one process, on syft's in-memory drive, for teaching and tests."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from syft.sync.connections.drive.gdrive_transport import GDriveConnection
from syft.sync.connections.drive.mock_drive_service import MockDriveBackingStore, MockDriveService
from syft.sync.sync.caches.persisted_dict import PersistedDict
from syft_rds import SyftRDSClient, SyftRDSClientConfig

from primia_lite.apps.syft.hospital import Datasite
from primia_lite.apps.syft.researcher import Researcher
from primia_lite.apps.syft.runner import quiet
from primia_lite.config import UserError
from primia_lite.data.films import Films
from primia_lite.federation.hospital import Hospital


@dataclass
class Federation:
    """Hospitals by name and who asks them; ``store`` is all that left a party's machine."""

    sites: dict[str, Datasite]
    researcher: Researcher
    store: MockDriveBackingStore = field(repr=False)
    workers: int = 4

    def sync(self) -> None:
        """All parties, one after the other: the drive isn't made for threads."""
        self._sync_sites()
        self.researcher.sync()

    def _sync_sites(self, fetch: bool = False) -> None:
        for site in self.sites.values():
            self.researcher.timed(site.name, "sync", site.fetch if fetch else site.sync)

    def turn(self) -> None:
        """Hospitals fetch what is new, answer side by side, and send."""
        self._sync_sites(fetch=True)
        with quiet(), ThreadPoolExecutor(self.workers) as pool:
            list(pool.map(lambda s: self.researcher.timed(s.name, "answer", s.work), self.sites.values()))
        self._sync_sites()


def in_memory(
    folder: str | Path,
    hospitals: Sequence[Hospital],
    mock: Films,
    dataset: str = "chest-xray",
    *,
    timeout_s: float = 600.0,
) -> Federation:
    """Hospitals that share ``dataset`` with a researcher and have pinned each other's keys.

    Parameters
    ----------
    folder : emptied; holds a folder for each party, which that party's machine would have
    hospitals : with a lasting ledger each, if a study is to have DP
    mock : made-up films of the same shape, for all mock halves
    """
    folder = Path(folder).resolve()
    marker = folder / "federation"
    if folder.exists() and any(folder.iterdir()) and not marker.exists():
        raise UserError(f"{folder} holds something else than a federation: choose an empty folder")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    marker.touch()
    store, emails = MockDriveBackingStore(), {h.name: f"{h.name.lower()}@hospital.example" for h in hospitals}
    asking = "researcher@university.example"
    with quiet():
        science = _client(store, asking, folder / "researcher" / "syftbox", owner=False)
        clients = {n: _client(store, e, folder / n / "syftbox", owner=True) for n, e in emails.items()}
        for name, client in clients.items():
            science.add_peer(emails[name], sync=False)
            client.load_peers()
            client.approve_peer_request(asking)
        science.load_peers()
    sites = {h.name: Datasite(clients[h.name], h, folder / h.name / "own", timeout_s=timeout_s) for h in hospitals}
    for site in sites.values():
        site.trust({other.name: other.public_key for other in sites.values()})
        site.add_dataset(dataset, mock, [asking])
    federation = Federation(sites, Researcher(science, emails, lambda: federation.turn(), folder / "researcher"), store)
    federation.researcher.sync()
    return federation


def _client(store: MockDriveBackingStore, email: str, folder: Path, *, owner: bool) -> SyftRDSClient:
    config = SyftRDSClientConfig._base_config_for_testing(
        email=email, syftbox_folder=folder, has_do_role=owner, has_ds_role=not owner, write_files=True,
        use_in_memory_cache=False,  # jobs read files
    )  # fmt: skip
    client = SyftRDSClient.from_config(config)
    client.sync_engine._add_connection(GDriveConnection.from_service(email, MockDriveService(store, email)))
    client.sync_engine.peer_manager.write_own_version()
    if owner:  # one process a party: what it knows of its files need not be read from the disk for each of them
        client.sync_engine.datasite_owner_syncer.event_cache.file_hashes = PersistedDict(None)
    return client
