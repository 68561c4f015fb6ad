"""How a hospital reaches a service: the proxy and the certificates that the environment or the system names."""

from __future__ import annotations

import http.cookiejar
import ipaddress
import ssl
import urllib.request
from collections.abc import Callable

import httpx

from primia_lite.config import UserError


def connector(
    url: str, ca_file: str | None, timeout_s: float, transport: httpx.BaseTransport | None
) -> tuple[Callable[[], httpx.Client], str]:
    """What connects to an address, and the address for messages, without passwords."""
    try:
        address = httpx.URL(url)
        if address.scheme not in ("http", "https") or not address.host:
            raise ValueError("it has no http:// or no host")
    except (httpx.InvalidURL, ValueError) as error:
        raise UserError(f"{url!r} isn't an address ({error}): give one such as http://127.0.0.1:8000") from error
    proxy = None if on_this_machine(address.host) else proxy_for(address)
    where = f"{address.scheme}://{address.netloc.decode()}{address.path.rstrip('/')}"
    if proxy is not None:
        where += f" (by the proxy {proxy.url.scheme}://{proxy.url.netloc.decode()} of HTTP_PROXY or the like)"
    try:
        if ca_file:
            trusted = ssl.create_default_context(cafile=ca_file)
        else:  # without TLS nobody is to be trusted, and no variable to be read
            secure = address.scheme == "https"
            trusted = httpx.create_ssl_context() if secure else ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    except (OSError, ValueError) as error:  # SSLError is an OSError
        raise UserError(
            f"the certificates of {ca_file or 'SSL_CERT_FILE or SSL_CERT_DIR'} can't be read ({error}): give a PEM "
            "file with the one to trust"
        ) from error

    def connect() -> httpx.Client:
        return httpx.Client(
            base_url=url, timeout=timeout_s, trust_env=False, headers={"Accept-Encoding": "identity"},
            transport=transport, proxy=proxy, verify=trusted,
            # A service has nothing to remember at a hospital.
            cookies=http.cookiejar.CookieJar(http.cookiejar.DefaultCookiePolicy(allowed_domains=[])),
        )  # fmt: skip

    return connect, where


def on_this_machine(host: str) -> bool:
    """Loopback names and addresses; and 0.0.0.0 and ::, which lead here, too."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host.lower().rstrip(".") == "localhost"
    address = getattr(address, "ipv4_mapped", None) or address
    return address.is_loopback or address.is_unspecified


def proxy_for(address: httpx.URL) -> httpx.Proxy | None:
    """The proxy for an address, as the environment or the system says."""
    found = urllib.request.getproxies()
    named = found.get(address.scheme) or found.get("all")
    if not named or any(map(urllib.request.proxy_bypass, (address.host, address.netloc.decode()))):
        return None
    try:
        proxy = httpx.Proxy(named if "://" in named else f"http://{named}")
        if not proxy.url.host or proxy.url.raw_path != b"/" or proxy.url.fragment:
            raise ValueError
        httpx.HTTPTransport(proxy=proxy).close()
    except (httpx.InvalidURL, ValueError, ImportError):
        # Not what it is: there may be a password in it.
        raise UserError(
            "HTTP_PROXY, HTTPS_PROXY or ALL_PROXY names a proxy that can't be used: give one such as "
            f"http://proxy.example:3128, or name {address.host} in NO_PROXY"
        ) from None
    return proxy
