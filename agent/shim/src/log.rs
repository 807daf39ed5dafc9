//! Log entries and log files: splitting streams into lines, rotating by size.

use crate::sys;

/// The longest piece of a line that becomes one entry, and how much is read at a time.
pub(crate) const PIECE: usize = 4096;
/// `2026-11-21T02:35:29.123456789Z`.
const TIME: usize = 30;
/// The time + ` stdout ` + `F ` + newline.
const FRAME: usize = TIME + 8 + 2 + 1;
/// Room for the longest entry.
pub(crate) const GATHER: usize = PIECE + FRAME;
const NAME: usize = 128;
const EAGAIN: isize = -11;

/// One output stream of the container.
pub(crate) struct Stream {
    fd: i32,
    tag: &'static [u8],
    held: usize,
    /// Whether the last entry was a part of a line.
    inside: bool,
    buffer: &'static mut [u8; PIECE],
}

impl Stream {
    pub(crate) const fn new(fd: i32, tag: &'static [u8], buffer: &'static mut [u8; PIECE]) -> Self {
        Self {
            fd,
            tag,
            held: 0,
            inside: false,
            buffer,
        }
    }

    /// The descriptor to wait for; negative after the end of the stream.
    pub(crate) const fn poll_fd(&self) -> i32 {
        self.fd
    }

    /// Whether an unfinished line is held back.
    pub(crate) const fn holds(&self) -> bool {
        self.held > 0
    }

    /// Reads once and logs every whole line; how much was read.
    pub(crate) fn pump(&mut self, log: &mut Log) -> usize {
        if self.fd < 0 {
            return 0;
        }
        let count = match sys::read(self.fd, &mut self.buffer[self.held..]) {
            EAGAIN => return 0,
            count @ 1.. => count.unsigned_abs(),
            _ => {
                sys::close(self.fd);
                self.fd = -1;
                self.release(log, true);
                return 0;
            }
        };
        log.stamp();
        let end = self.held + count;
        let mut start = 0;
        for index in self.held..end {
            if self.buffer[index] == b'\n' {
                log.entry(self.tag, true, &self.buffer[start..index]);
                self.inside = false;
                start = index + 1;
            }
        }
        self.buffer.copy_within(start..end, 0);
        self.held = end - start;
        if self.held == PIECE {
            self.release(log, false);
        }
        count
    }

    /// Logs what is held back, as a part of a line, or as its end.
    pub(crate) fn release(&mut self, log: &mut Log, last: bool) {
        if self.held > 0 || (last && self.inside) {
            log.entry(self.tag, last, &self.buffer[..self.held]);
            self.held = 0;
            self.inside = !last;
        }
    }
}

/// The current log file and its older ones: `NAME`, `NAME.1`, …
pub(crate) struct Log {
    dir: i32,
    name: &'static [u8],
    fd: i32,
    size: u64,
    max_size: u64,
    max_file: u64,
    /// Whether the last write stopped in the middle of an entry.
    torn: bool,
    /// What entries bear as their time.
    time: [u8; TIME],
    /// How many bytes of entries came since [`Log::take_load`].
    load: usize,
    filled: usize,
    out: &'static mut [u8; GATHER],
}

impl Log {
    /// `name` ends with NUL.
    pub(crate) fn new(
        dir: i32,
        name: &'static [u8],
        max_size: u64,
        max_file: u64,
        out: &'static mut [u8; GATHER],
    ) -> Self {
        let mut log = Self {
            dir,
            name,
            fd: -1,
            size: 0,
            max_size: max_size.max(1),
            max_file: max_file.max(1),
            torn: false,
            time: [0; TIME],
            load: 0,
            filled: 0,
            out,
        };
        log.stamp();
        log.open();
        log
    }

    /// Takes the time for the entries that follow: once for what was read at once, because asking for each of two
    /// thousand short lines costs more than copying them.
    pub(crate) fn stamp(&mut self) {
        timestamp(sys::now(), &mut self.time);
    }

    /// How many bytes of entries came since this was last asked.
    pub(crate) fn take_load(&mut self) -> usize {
        core::mem::take(&mut self.load)
    }

    /// Adds an entry; `text` has at most [`PIECE`] bytes.
    pub(crate) fn entry(&mut self, tag: &[u8], full: bool, text: &[u8]) {
        let length = text.len() + FRAME;
        self.load += length;
        if self.filled + length > self.out.len() {
            self.flush();
        }
        let pending = self.filled as u64;
        if self.size + pending > 0 && self.size + pending + length as u64 > self.max_size {
            self.flush();
            self.rotate();
        }
        let time = self.time;
        self.push(&time);
        self.push(tag);
        self.push(if full { b"F " } else { b"P " });
        self.push(text);
        self.push(b"\n");
    }

    fn push(&mut self, bytes: &[u8]) {
        let end = self.filled + bytes.len();
        if let Some(space) = self.out.get_mut(self.filled..end) {
            space.copy_from_slice(bytes);
            self.filled = end;
        }
    }

    /// Writes what is gathered. What cannot be written (a full disk) is dropped: the container must never
    /// stand still because of its log.
    pub(crate) fn flush(&mut self) {
        if self.filled == 0 {
            return;
        }
        if self.fd < 0 {
            self.open();
        }
        if self.fd >= 0 {
            if self.torn && sys::write(self.fd, b"\n") == 1 {
                self.size += 1;
                self.torn = false;
            }
            let done = if self.torn {
                0
            } else {
                sys::write(self.fd, &self.out[..self.filled])
            };
            self.size += done as u64;
            if done > 0 && done < self.filled {
                self.torn = true;
            }
        }
        self.filled = 0;
    }

    fn open(&mut self) {
        self.fd = sys::open_append(self.dir, self.name);
        self.size = if self.fd < 0 { 0 } else { sys::size(self.fd) };
    }

    /// Moves every file one on, dropping the oldest, and begins a new one. When that fails the current one
    /// is cut: the limit on size holds whatever happens.
    fn rotate(&mut self) {
        let mut moved = self.max_file > 1;
        let mut index = self.max_file - 1;
        while moved && index > 0 {
            let (mut from, mut to) = ([0_u8; NAME], [0_u8; NAME]);
            self.numbered(index - 1, &mut from);
            self.numbered(index, &mut to);
            // Older files may not exist yet; only the current one must move.
            let renamed = sys::rename(self.dir, &from, &to);
            if index == 1 {
                moved = renamed;
            }
            index -= 1;
        }
        if moved {
            sys::close(self.fd);
            self.open();
        } else if self.fd >= 0 {
            sys::truncate(self.fd);
            self.size = 0;
        }
        self.torn = false;
    }

    /// `NAME` for 0, else `NAME.index`, NUL-terminated.
    fn numbered(&self, index: u64, out: &mut [u8; NAME]) {
        // Room for ".100" and a NUL.
        let length = (self.name.len() - 1).min(NAME - 24);
        out[..length].copy_from_slice(&self.name[..length]);
        if index > 0 {
            out[length] = b'.';
            let mut digits = [0_u8; 24];
            let count = decimal(index, &mut digits).min(20);
            out[length + 1..=length + count].copy_from_slice(&digits[..count]);
        }
    }
}

/// Writes `value` in decimal; how many digits that took.
pub(crate) fn decimal(mut value: u64, out: &mut [u8; 24]) -> usize {
    let mut count = 1;
    let mut rest = value;
    while rest >= 10 {
        rest /= 10;
        count += 1;
    }
    for index in (0..count).rev() {
        out[index] = b'0' + (value % 10) as u8;
        value /= 10;
    }
    count
}

/// Writes `YYYY-MM-DDTHH:MM:SS.nnnnnnnnnZ` (RFC 3339).
fn timestamp((seconds, nanoseconds): (i64, i64), out: &mut [u8; TIME]) {
    let (days, second) = (seconds.div_euclid(86400), seconds.rem_euclid(86400));
    // Days to civil date, after Howard Hinnant, "chrono-compatible low-level date algorithms".
    let z = days + 719_468;
    let era = z.div_euclid(146_097);
    let day_of_era = z.rem_euclid(146_097);
    let year_of_era =
        (day_of_era - day_of_era / 1460 + day_of_era / 36524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted + 2) / 5 + 1;
    let month = if shifted < 10 {
        shifted + 3
    } else {
        shifted - 9
    };
    let year = year_of_era + era * 400 + i64::from(month <= 2);

    out.copy_from_slice(b"0000-00-00T00:00:00.000000000Z");
    let mut put = |value: i64, end: usize, digits: usize| {
        let mut value = value.unsigned_abs();
        for index in 0..digits {
            out[end - index] = b'0' + (value % 10) as u8;
            value /= 10;
        }
    };
    put(year, 3, 4);
    put(month, 6, 2);
    put(day, 9, 2);
    put(second / 3600, 12, 2);
    put(second / 60 % 60, 15, 2);
    put(second % 60, 18, 2);
    put(nanoseconds, 28, 9);
}
