//! Running iptables and nft.

use std::{
    io::{self, Write as _},
    process::{Command, Stdio},
};

use super::{
    Family, Rules, Tool,
    rules::{CHAIN, REDIRECT, TABLE},
};

/// Why rules are not in force.
#[derive(Debug, thiserror::Error)]
pub enum ToolError {
    /// The program cannot be started.
    #[error("{0} cannot be started: {1}; install it, or choose the other one by --tool")]
    Start(&'static str, io::Error),
    /// The program refused.
    #[error("{program} refused: {said}{hint}")]
    Refused {
        /// Which one.
        program: &'static str,
        /// What it said.
        said: String,
        /// What may help.
        hint: &'static str,
    },
}

struct Iptables {
    family: Family,
    command: &'static str,
    restore: &'static str,
}

const BOTH: [Iptables; 2] = [
    Iptables { family: Family::V4, command: "iptables", restore: "iptables-restore" },
    Iptables { family: Family::V6, command: "ip6tables", restore: "ip6tables-restore" },
];

/// The program to use where none is asked for.
pub(super) fn installed() -> Tool {
    let there = |program: &str| {
        let mut command = Command::new(program);
        command.arg("--version").stdout(Stdio::null()).stderr(Stdio::null()).status().is_ok()
    };
    if there("iptables-restore") || !there("nft") { Tool::Iptables } else { Tool::Nft }
}

/// The rules as a person would apply them.
pub(super) fn text(tool: Tool, rules: &Rules) -> String {
    match tool {
        Tool::Nft => format!("# nft -f - <<END\n{}", rules.nft()),
        Tool::Iptables => {
            let of = |Iptables { family, command, restore }: Iptables| {
                let rules = rules.iptables(family);
                format!(
                    "# {restore} --wait --noflush <<END\n{rules}# {command} --wait -t nat -A OUTPUT -p tcp -j {CHAIN}\n"
                )
            };
            BOTH.map(of).concat()
        }
    }
}

/// Puts the rules in force.
pub(super) fn apply(tool: Tool, rules: &Rules) -> Result<(), ToolError> {
    match tool {
        Tool::Nft => run("nft", &["-f", "-"], Some(&rules.nft())),
        Tool::Iptables => {
            for Iptables { family, command, restore } in BOTH {
                run(restore, &["--wait", "--noflush"], Some(&rules.iptables(family)))?;
                let jump = |how| ["--wait", "-t", "nat", how, "OUTPUT", "-p", "tcp", "-j", CHAIN];
                if run(command, &jump("-C"), None).is_err() {
                    run(command, &jump("-A"), None)?;
                }
            }
            Ok(())
        }
    }
}

/// Takes the rules away, those of either program unless one is named.
pub(super) fn remove(tool: Option<Tool>) -> Result<(), ToolError> {
    let Some(tool) = tool else {
        let removed = [Tool::Iptables, Tool::Nft].map(remove_by);
        let started = removed.iter().any(|done| !matches!(done, Err(ToolError::Start(..))));
        // One of the two need not be installed.
        return removed.into_iter().filter(|done| !started || !matches!(done, Err(ToolError::Start(..)))).collect();
    };
    remove_by(tool)
}

fn remove_by(tool: Tool) -> Result<(), ToolError> {
    match tool {
        // Made first, as it is an error to delete what is not there.
        Tool::Nft => run("nft", &["-f", "-"], Some(&format!("table inet {TABLE}\ndelete table inet {TABLE}\n"))),
        Tool::Iptables => {
            for Iptables { command, .. } in BOTH {
                let nat = |rest: &[&'static str]| run(command, &[&["--wait", "-t", "nat"], rest].concat(), None);
                if let Err(error) = nat(&["-L", CHAIN, "-n"]) {
                    match error {
                        ToolError::Refused { said, .. } if absent(&said) => continue,
                        error => return Err(error),
                    }
                }
                while nat(&["-C", "OUTPUT", "-p", "tcp", "-j", CHAIN]).is_ok() {
                    nat(&["-D", "OUTPUT", "-p", "tcp", "-j", CHAIN])?;
                }
                for chain in [CHAIN, REDIRECT] {
                    nat(&["-F", chain])?;
                    nat(&["-X", chain])?;
                }
            }
            Ok(())
        }
    }
}

/// Whether iptables says that there is no such chain, in the words of any of its versions; the last are those of one
/// that is made of nft, about a chain that is not there.
fn absent(said: &str) -> bool {
    ["No chain/target/match by that name", "does not exist", "is incompatible, use 'nft' tool"]
        .iter()
        .any(|words| said.contains(words))
}

fn run(program: &'static str, arguments: &[&str], input: Option<&str>) -> Result<(), ToolError> {
    let start = |error| ToolError::Start(program, error);
    let mut command = Command::new(program);
    command.args(arguments).stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::piped());
    let mut child = command.spawn().map_err(start)?;
    if let Some(mut stdin) = child.stdin.take() {
        // A program that reads nothing says why by its status.
        let _ = stdin.write_all(input.unwrap_or_default().as_bytes());
    }
    let output = child.wait_with_output().map_err(start)?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr).trim().to_owned();
    let denied = ["ermission denied", "not permitted"].iter().any(|words| said.contains(words));
    let hint = if denied { "; it needs root or CAP_NET_ADMIN" } else { "" };
    Err(ToolError::Refused { program, said, hint })
}
