//! A small origin: it answers HTTP/1.1 with what reached it, and other bytes with a line about them.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::thread;

/// Serves TCP on `address` until the process ends. Returns the bound address; port 0 asks for a free one.
pub fn tcp(address: SocketAddr) -> io::Result<SocketAddr> {
    let listener = TcpListener::bind(address)?;
    let bound = listener.local_addr()?;
    thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            thread::spawn(move || {
                let place = stream.local_addr().map(|a| a.to_string()).unwrap_or_default();
                // A client that goes away early is no concern of the origin's.
                let _ = stream.try_clone().and_then(|reader| talk(reader, stream, &place));
            });
        }
    });
    Ok(bound)
}

/// Serves a Unix socket at `path`, replacing what is there, until the process ends.
pub fn unix(path: &Path) -> io::Result<()> {
    if path.exists() {
        std::fs::remove_file(path)?;
    }
    let listener = UnixListener::bind(path)?;
    let place = format!("unix:{}", path.display());
    thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let place = place.clone();
            thread::spawn(move || {
                let _ = stream.try_clone().and_then(|reader| talk(reader, stream, &place));
            });
        }
    });
    Ok(())
}

/// One connection: HTTP requests one after the other, or one line about what came instead.
fn talk(reader: impl Read, mut writer: impl Write, place: &str) -> io::Result<()> {
    let mut reader = BufReader::new(reader);
    loop {
        let mut line = Vec::new();
        if reader.read_until(b'\n', &mut line)? == 0 {
            return Ok(());
        }
        let line = String::from_utf8_lossy(&line).trim_end().to_owned();
        if !line.ends_with(" HTTP/1.1") && !line.ends_with(" HTTP/1.0") {
            return writer.write_all(format!("{place} got {} bytes\n", line.len()).as_bytes());
        }
        let (mut host, mut length) = (String::new(), 0u64);
        loop {
            let mut header = String::new();
            if reader.read_line(&mut header)? == 0 || header.trim_end().is_empty() {
                break;
            }
            if let Some((name, value)) = header.split_once(':') {
                match name.to_ascii_lowercase().as_str() {
                    "host" => host = value.trim().to_owned(),
                    "content-length" => length = value.trim().parse().unwrap_or(0),
                    _ => {}
                }
            }
        }
        io::copy(&mut (&mut reader).take(length), &mut io::sink())?;
        let body = format!("{place} got {line} for {host}\n");
        let head = format!("HTTP/1.1 200 OK\r\ncontent-type: text/plain\r\ncontent-length: {}\r\n\r\n", body.len());
        writer.write_all(format!("{head}{body}").as_bytes())?;
    }
}
