"""A model of processes in which nothing is shared: every process has a bytearray of its own.

Beside it stands the sharing, page by page: pages of one origin carry one token, and a write to a page whose token
another process has, too, is a copy.
"""


class Model:
    def __init__(self, page_size):
        self.page_size, self.bytes, self.origin = page_size, {}, {}
        self.first_touches = self.copies = self.tokens = 0

    def new(self, name, num_bytes):
        pages = -(-num_bytes // self.page_size)
        self.bytes[name], self.origin[name] = bytearray(pages * self.page_size), {}

    def written(self, address, count):
        return sorted({byte // self.page_size for byte in range(address, address + count)})

    def shared(self, name, page):
        token = self.origin[name].get(page)
        return token is not None and sum(pages.get(page) == token for pages in self.origin.values()) > 1

    def fresh(self, name, pages):
        """How many of these pages a write gives a new place."""
        return sum(page not in self.origin[name] or self.shared(name, page) for page in pages)

    def write(self, name, address, data):
        self.bytes[name][address : address + len(data)] = data
        for page in self.written(address, len(data)):
            if page in self.origin[name] and not self.shared(name, page):
                continue
            self.first_touches += page not in self.origin[name]
            self.copies += page in self.origin[name]
            self.tokens += 1
            self.origin[name][page] = self.tokens

    def fork(self, name, child):
        self.bytes[child], self.origin[child] = bytearray(self.bytes[name]), dict(self.origin[name])

    def exit(self, name):
        del self.bytes[name], self.origin[name]

    def places(self):
        """Frames and swap that all processes take together."""
        return len({(page, token) for pages in self.origin.values() for page, token in pages.items()})
