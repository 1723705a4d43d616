//! `origin [--listen IP:PORT] [--unix PATH]`: an HTTP and TCP echo for trying Portolan by hand.

use std::path::Path;

use anyhow::{Context, bail};
use portolan_tests::origin;

fn main() -> anyhow::Result<()> {
    let mut arguments = std::env::args().skip(1);
    while let Some(flag) = arguments.next() {
        let value = arguments.next().with_context(|| format!("{flag} needs a value"))?;
        match flag.as_str() {
            "--listen" => println!("origin listens on {}", origin::tcp(value.parse()?)?),
            "--unix" => {
                origin::unix(Path::new(&value))?;
                println!("origin listens on unix:{value}");
            }
            _ => bail!("usage: origin [--listen IP:PORT] [--unix PATH]"),
        }
    }
    loop {
        std::thread::park();
    }
}
